"""What the sparse representations share: entries of C on a pattern, held as they are or as the network of which they are the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from precond.blocks import Block
from precond.errors import InvalidCombination
from precond.observe import Columns, Gradient, Kind, Observation, Product
from precond.operators import Operator, Sparse, SparsePrecision
from precond.representations.base import Representation, Statistics, mean_gradient, product_columns, refuse_kind, weighted_gradients, zeros
from precond.representations.centring import deviation, first_moment
from precond.representations.patterns import Form, Layout, Pattern, check, layout
from precond.statistics import Stat

_CHUNK_ELEMENTS = 1 << 24  # products of entries are formed this many numbers at a time


@dataclass(frozen=True, kw_only=True)
class SparseForm(Representation):
    """Some entries of C, (scale) sum_ik u_ik[i] u_ik[j], and no others; what is averaged are entries, and what is made of them is made after.

    form "masked": C on the pattern and zero elsewhere, the diagonal always there; it has products and no inverse of its own. "precision":
    FANG's network, whose inverse (I - B)^T D^-1 (I - B) is exactly sparse, from C on each coordinate and its parents.

    pattern: in the flat order of the block,
        "bias": a weight with the bias of its output unit, where it has one; gamma with beta. "unit": all of an output unit. "band": up to
        `width` neighbours before. "diagonal": none. As a graph, what is named is the parents of a coordinate (in a unit those before it).
        Of your own, "masked": a symmetric boolean mask (n, n), or pairs of indices (2, m); "precision": the parents of each coordinate, a
        list of lists or integers (n, k) with absent ones -1, in any order without a cycle.

    The diagonal and m pairs are held, each once. Cost of columns: (n + m) a row, beside the gradients by example; of a gradient n + m; of
    products ("masked" only) n of them, since nothing else gives an entry exactly. "precision" with k parents works on n blocks of
    (k + 1)^2, so that "unit" costs n in'^2: the representation `unit` holds the same matrix cheaper.

    Raises:
        ValueError: a pattern without meaning: unknown, not symmetric, out of range, or cyclic.
        InvalidCombination: a pattern of the user's own does not fit a block.
    """

    centres = True

    form: Form = "precision"
    pattern: Pattern | Mapping[str, Pattern] = "bias"
    width: int = 1
    _layouts: dict[Any, Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self.chosen(None), self.form, self.width)

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]
        # a regression on parents is that of a covariance, which products may not be
        return ("columns", "gradient", "product") if self.form == "masked" else ("columns", "gradient")

    @property
    def structure(self) -> type[Operator]:  # type: ignore[override]
        return Sparse if self.form == "masked" else SparsePrecision

    def chosen(self, block: Block | None) -> Pattern:
        """The pattern of a block; without one, of any."""
        if isinstance(self.pattern, Mapping):
            raise ValueError(f"a mapping from layers to patterns is for 'layer_sparse'; {self.name!r} takes one pattern.")
        return self.pattern

    def remark(self, shape: tuple[int, ...]) -> str | None:
        band = f" of width {self.width}" if self.pattern == "band" else ""
        which = f"the pattern {self.pattern!r}{band}" if isinstance(self.pattern, str) else "a pattern of the user's own"
        return f"{self.form} on {which}"

    def layout(self, block: Block) -> Layout:
        """The entries of a block, found once."""
        device = zeros(block, 0).device
        key = (block.parameters, tuple((m.parameters, m.rows, m.transposed) for m in block.matrices()), str(device))
        if key not in self._layouts:
            try:
                self._layouts[key] = layout(self.chosen(block), self.form, self.width, block).to(device)
            except ValueError as error:
                raise InvalidCombination(
                    f"representation {self.name!r} cannot hold block {block.name!r} of {block.n} coordinates: {error}"
                ) from error
        return self._layouts[key]

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        self.layout(block)  # a pattern that does not fit is refused when the plan is made
        return {"diagonal": Stat("mean", form="diagonal"), "pairs": Stat("mean")}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        pairs = self.layout(block).pairs
        if isinstance(observation, Gradient):
            gradient = mean_gradient(observation, block).unsqueeze(0)
            return {"diagonal": gradient.square().squeeze(0), "pairs": _products(gradient, pairs)}
        if isinstance(observation, Product) and "product" in self.requests:
            return _from_products(observation, block, pairs)
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        diagonal, values = zeros(block, block.n), zeros(block, pairs.shape[1])
        for rows in weighted_gradients(observation, block):
            diagonal = diagonal + rows.square().sum(0)
            values = values + _products(rows, pairs)
        return {"diagonal": diagonal, "pairs": values} | first_moment(observation, block)

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        kept = self.layout(block)
        entries = torch.cat([statistics["diagonal"], statistics["pairs"]])
        mean = deviation(statistics)
        if mean is not None:
            entries = entries - torch.cat([mean.square(), mean[kept.pairs[0]] * mean[kept.pairs[1]]])
        if kept.parents is not None and kept.places is not None:
            return SparsePrecision(entries[kept.places], kept.parents)
        every = torch.arange(block.n, device=entries.device).expand(2, -1)
        return Sparse(torch.cat([every, kept.pairs], 1), entries, block.n)

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return (block.n + self.layout(block).pairs.shape[1]) * itemsize


def _products(rows: Tensor, pairs: Tensor) -> Tensor:
    """Sum over rows (r, n) of the products of the two entries of each pair, (m,)."""
    step = max(1, _CHUNK_ELEMENTS // max(1, len(rows)))
    return torch.cat([(rows[:, i] * rows[:, j]).sum(0) for i, j in zip(pairs[0].split(step), pairs[1].split(step), strict=True)])


def _from_products(observation: Product, block: Block, pairs: Tensor) -> Statistics:
    diagonal, values = zeros(block, block.n), zeros(block, pairs.shape[1])
    for indices, rows in product_columns(observation, block):
        place = torch.arange(len(indices))
        diagonal[indices] = rows[place, indices]
        first, last = torch.searchsorted(pairs[0].contiguous(), torch.stack([indices[0], indices[-1] + 1]).to(pairs.device)).tolist()
        values[first:last] = rows[pairs[0, first:last] - indices[0], pairs[1, first:last]]
    return {"diagonal": diagonal, "pairs": values}
