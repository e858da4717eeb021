"""Which dimensions of a tensor have a factor, and in which shape: squeezed, merged, cut into tiles, or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.blocks import Block
from precond.tiling import Tiling, even_pieces

Merge = Literal["none", "first", "last", "kernel", "rest", "matrix"]
Oversized = Literal["tile", "identity", "diagonal"]
Modes = tuple[int, ...] | Literal["all", "shortest"]
FactorForm = Literal["dense", "diagonal", "identity"]


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The options of a representation over dimensions.

    Args:
        squeeze: drop dimensions of length 1.
        merge_dims: neighbours that become one dimension. "first" or "last": greedily while their product is at most `max_dim`, from that
            end; "kernel": all after the second, (out, in, kernel); "rest": all after the first, (out, rest); "matrix": likewise, and a
            vector is (n, 1).
        max_dim: the longest dimension that has a dense factor; None: no limit.
        oversized: what becomes of a longer one. "tile": it is cut into as few pieces as there can be, as equal as they can be, and every tile has factors of
            its own; "identity" or "diagonal": its factor is one.
        max_skew: a dimension n has a dense factor only where n^2 is at most this multiple of the number of entries of the tensor, so that 1 bounds
            its memory by the tensor's and gives a vector a diagonal (PSGD); what becomes of another one is "identity" or "diagonal".
        modes: the dimensions that have a factor at all, counted after merging, from the end where negative, one that a tensor has not
            left out; "shortest": one, the first of the shortest. The others have the identity.
        vectors: whether tensors of one dimension have a factor.
    """

    squeeze: bool = False
    merge_dims: Merge = "none"
    max_dim: int | None = None
    oversized: Oversized = "tile"
    modes: Modes = "all"
    vectors: bool = True
    max_skew: float | None = None

    def check(self, owner: str) -> None:
        """Raise ValueError for a value that has no meaning, in the name of the class that has the options."""
        for name, value, known in (("merge_dims", self.merge_dims, Merge), ("oversized", self.oversized, Oversized)):
            if value not in get_args(known):
                raise ValueError(f"{owner}({name}={value!r}): choose {' or '.join(map(repr, get_args(known)))}.")
        least = 1 if self.oversized == "tile" else 0
        if self.max_dim is not None and (isinstance(self.max_dim, bool) or not isinstance(self.max_dim, int) or self.max_dim < least):
            raise ValueError(f"{owner}(max_dim={self.max_dim!r}): it is a length, {least} or more, or None for no limit.")
        if self.max_skew is not None and not (self.max_skew > 0 and self.oversized != "tile"):
            raise ValueError(
                f"{owner}(max_skew={self.max_skew!r}, oversized={self.oversized!r}): a skew is above 0, and oversized='diagonal' or 'identity' says "
                "what becomes of a dimension beyond it."
            )
        if self.merge_dims in ("first", "last") and self.max_dim is None:
            raise ValueError(f"{owner}(merge_dims={self.merge_dims!r}): dimensions merge while their product is at most max_dim: give one.")
        if isinstance(self.modes, str):
            if self.modes not in ("all", "shortest"):
                raise ValueError(f"{owner}(modes={self.modes!r}): give numbers of dimensions, such as (0,), or 'all' or 'shortest'.")
        elif not isinstance(self.modes, tuple) or not self.modes or not all(isinstance(m, int) and not isinstance(m, bool) for m in self.modes):
            raise ValueError(f"{owner}(modes={self.modes!r}): give numbers of dimensions, such as (0,), or 'all' or 'shortest'.")

    def tiling(self, shape: Sequence[int]) -> Tiling:
        """The shape in which a tensor is held, and its tiles."""
        held = self._held(shape)
        chosen = self._modes(held) if self._has_factors(shape) else set()
        cap = self.max_dim if self.oversized == "tile" else None
        return Tiling(held, tuple((n,) if cap is None or m not in chosen else even_pieces(n, cap) for m, n in enumerate(held)))

    def forms(self, shape: Sequence[int]) -> tuple[FactorForm, ...]:
        """The form of the factor of every dimension that is held."""
        held = self._held(shape)
        chosen = self._modes(held) if self._has_factors(shape) else set()
        entries = torch.Size(held).numel()
        return tuple("identity" if m not in chosen else self._form(n, entries) for m, n in enumerate(held))

    def remark(self, shape: Sequence[int]) -> str | None:
        """What is not plain from the tensor's shape, in words."""
        tiling, forms = self.tiling(shape), self.forms(shape)
        left = [
            f"the factor of dimension {m} ({n}) {form}"
            for m, (n, form) in enumerate(zip(tiling.shape, forms, strict=True))
            if form != "dense"
        ]
        said = [f"({', '.join(map(str, shape))}) as {tiling}" if tiling.shape != tuple(shape) else str(tiling)]
        return ", ".join((said if tiling.shape != tuple(shape) or tiling.cut else []) + left) or None

    def _has_factors(self, shape: Sequence[int]) -> bool:
        return self.vectors or len(shape) > 1

    def _form(self, n: int, entries: int) -> FactorForm:
        if self.oversized == "tile":
            return "dense"
        short = self.max_dim is None or n <= self.max_dim
        return "dense" if short and (self.max_skew is None or n * n <= self.max_skew * entries) else self.oversized

    def _modes(self, held: Sequence[int]) -> set[int]:
        if self.modes == "shortest":
            return {min(range(len(held)), key=held.__getitem__)}
        if self.modes == "all":
            return set(range(len(held)))
        return {m % len(held) for m in self.modes if -len(held) <= m < len(held)}

    def _held(self, shape: Sequence[int]) -> tuple[int, ...]:
        sizes = [n for n in shape if n != 1] if self.squeeze else list(shape)
        if self.merge_dims in ("kernel", "rest", "matrix"):
            kept = 2 if self.merge_dims == "kernel" else 1
            rest = [int(torch.Size(sizes[kept:]).numel())]  # of nothing: 1
            sizes = sizes[:kept] + (rest if len(sizes) > kept or self.merge_dims == "matrix" else [])
        elif self.merge_dims in ("first", "last"):
            assert self.max_dim is not None
            merged: list[int] = []
            for n in sizes if self.merge_dims == "first" else reversed(sizes):
                if merged and merged[-1] * n <= self.max_dim:
                    merged[-1] *= n
                else:
                    merged.append(n)
            sizes = merged if self.merge_dims == "first" else merged[::-1]
        return tuple(sizes) or (1,)


def tiled(block: Block) -> Tiling:
    """The tiling of a block, the plain one where it has none."""
    return block.tiling or Tiling(block.shape, tuple((n,) for n in block.shape))


def key(name: str, mode: int, group: int) -> str:
    """The name of what is kept of a dimension: its number, and that of the group where there is more than one."""
    return f"{name}{mode}.{group}" if group else f"{name}{mode}"


def contraction(tiles: Tensor, mode: int, form: FactorForm = "dense") -> Tensor:
    """The sum over rows of G_(mode) G_(mode)^T of tiles (rows, b, n_1, ..., n_k), (b, n_m, n_m); or its diagonal (b, n_m)."""
    if form == "diagonal":
        return tiles.square().sum([d for d in range(tiles.dim()) if d not in (1, mode + 2)])
    unfolded = tiles.movedim((1, mode + 2), (0, 1)).flatten(2)
    return unfolded @ unfolded.mT
