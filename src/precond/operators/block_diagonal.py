"""Named blocks on disjoint coordinates of one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from precond.operators.base import Operator

Layout = Mapping[str, Tensor | int]


class BlockDiagonal(Operator):
    """Operators on disjoint sets of coordinates; zero on coordinates that no block has.

    Args:
        blocks: name to operator.
        positions: name to the indices, in the whole vector, of the block's coordinates in the block's order; None: one block after another.
            Any mapping but a dict is left unread until a product asks: the indices are twice the size of the vector.
        n: the size of the whole; None: as many as the blocks have.

    >>> from precond.operators import Diagonal
    >>> blocks = {"a": Diagonal(torch.ones(1)), "b": Diagonal(torch.tensor([2.0]))}
    >>> BlockDiagonal(blocks, {"a": torch.tensor([2]), "b": torch.tensor([0])}, n=3).diagonal()
    tensor([2., 0., 1.])
    """

    def __init__(self, blocks: Mapping[str, Operator], positions: Mapping[str, Tensor] | None = None, n: int | None = None) -> None:
        if not blocks:
            raise ValueError("BlockDiagonal needs at least one block.")
        self.blocks = dict(blocks)
        total = sum(block.n for block in self.blocks.values())
        self._n = total if n is None else n
        self.consecutive = positions is None and total == self._n
        """Whether the blocks are one after another and cover the whole."""
        self.positions: Mapping[str, Tensor] = self._consecutive() if positions is None else positions
        self.live = any(block.live for block in self.blocks.values())
        for name, block in self.blocks.items() if isinstance(self.positions, dict) else ():
            if self.positions[name].shape != (block.n,):
                raise ValueError(f"block {name!r} has {block.n} coordinates but positions of shape {tuple(self.positions[name].shape)}.")
        if total > self._n:
            raise ValueError(f"the blocks have {total} coordinates together, more than n = {self._n}.")

    def _consecutive(self) -> dict[str, Tensor]:
        positions, start = {}, 0
        for name, block in self.blocks.items():
            positions[name] = torch.arange(start, start + block.n, device=block.device)
            start += block.n
        return positions

    @property
    def n(self) -> int:
        return self._n

    @property
    def _like(self) -> Tensor:
        return next(iter(self.blocks.values()))._like

    def fields(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "positions": None if self.consecutive else self.positions, "n": self._n}

    @property
    def layout(self) -> Layout:
        """Where the coordinates of each block are: how many follow, where the blocks are one after another, else their indices."""
        return {name: block.n if self.consecutive else self.positions[name] for name, block in self.blocks.items()}

    def with_blocks(self, blocks: Mapping[str, Operator]) -> BlockDiagonal:
        """Other operators on the same coordinates."""
        return BlockDiagonal(blocks, None if self.consecutive else self.positions, self._n)

    def _matmul(self, V: Tensor) -> Tensor:
        parts = take(V, self.layout)
        return put({name: block._matmul(parts[name]) for name, block in self.blocks.items()}, self.layout, V)

    def to_dense(self) -> Tensor:
        result = torch.zeros(self.n, self.n, dtype=self.dtype, device=self.device)
        for name, block in self.blocks.items():
            where = self.positions[name]
            result[where[:, None], where] = block.to_dense()
        return result

    def diagonal(self) -> Tensor:
        result = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        for name, block in self.blocks.items():
            result[self.positions[name]] = block.diagonal()
        return result

    def trace(self) -> Tensor:
        return torch.stack([block.trace() for block in self.blocks.values()]).sum()

    def logdet(self) -> Tensor:
        total = torch.stack([block.logdet() for block in self.blocks.values()]).sum()
        covered = sum(block.n for block in self.blocks.values())
        return total if covered == self.n else torch.full_like(total, -torch.inf)

    @property
    def noise(self) -> int:
        return sum(block.noise for block in self.blocks.values())

    def _colour(self, Z: Tensor) -> Tensor:
        result = Z.new_zeros(self.n, Z.shape[1])
        parts = Z.split([block.noise for block in self.blocks.values()])
        for (name, block), part in zip(self.blocks.items(), parts, strict=True):
            result[self.positions[name]] = block._colour(part)
        return result


def take(V: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The coordinates of each block, of columns (n, k)."""
    sizes = [size for size in layout.values() if isinstance(size, int)]
    if sizes:
        return dict(zip(layout, V.split(sizes), strict=True))
    return {name: V[where] for name, where in layout.items()}


def put(parts: Mapping[str, Tensor], layout: Layout, like: Tensor) -> Tensor:
    """The inverse of `take`, with zeros on coordinates that no block has; `like` has the shape of the whole."""
    if any(isinstance(size, int) for size in layout.values()):
        return torch.cat([parts[name] for name in layout])
    result = torch.zeros_like(like)
    for name, where in layout.items():
        result[where] = parts[name]
    return result
