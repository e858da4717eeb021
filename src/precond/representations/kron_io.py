"""Kronecker product of an input and an output factor: K-FAC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.blocks import Block, leading_size
from precond.layers import OneHot, check_examples
from precond.layers import Rule as LayerRule
from precond.observe import Columns, Observation, Part
from precond.operators import Diagonal, Kronecker, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, refuse_kind, zeros
from precond.statistics import Form, Stat


@REGISTRY.register("kron_io")
@dataclass(frozen=True, kw_only=True)
class KronIO(Representation):
    """C_l ~ B (x) A, in coordinates vec [W, b] row-major: A (in', in') of inputs, B (out, out) of output gradients.

    sharing="expand" treats positions as independent data, A = mean over rows of a a^T, B = scale * sum_k,rows g g^T;
    "reduce" first averages a and sums g over positions. Both are plain K-FAC where a layer has one position. The bias
    is joined by a homogeneous 1 in a. Uses of a tied weight expand like positions. An Embedding's A is diagonal
    (counts) and comes first, as its weight is stored input first; a grouped convolution has one pair a group.

    Memory in'^2 + out^2; cost N R (in'^2 + K out^2). Sources: Martens & Grosse 2015; Grosse & Martens 2016;
    Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures", 2023.

    >>> KronIO(sharing="reduce").sharing
    'reduce'
    """

    scope = "matrix"
    requests = ("columns",)
    structure = Kronecker

    sharing: Literal["expand", "reduce"] = "expand"

    def __post_init__(self) -> None:
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"KronIO(sharing={self.sharing!r}): choose 'expand' or 'reduce'.")

    def hosts(self, block: Block) -> str | None:
        owner = next(iter(block.layers.values()))
        if block.rows is None or not owner.rule.linear or "weight" not in owner.parameters:
            return "it is no product of an input and an output gradient, so it has no Kronecker factors"
        if any(layer.rule is not owner.rule for layer in block.layers.values()):
            return "its weight is tied between layers of different kinds, where inputs and outputs exchange roles"
        if self.sharing == "reduce" and not owner.rule.joint:
            return "averaging one-hot rows over positions needs a dense factor of the vocabulary's size"
        return None

    def fallback(self, block: Block) -> str:
        return "unit" if all(layer.rule.elementwise for layer in block.layers.values()) else "diagonal"

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        input_form: Form = "matrix" if _owner_rule(block).joint else "diagonal"
        return {"A": Stat("mean", degree=0.0, form=input_form), "B": Stat("mean", form="matrix")}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        sums: list[Tensor] | None = None
        for part in observation.parts:
            found = self._sums(part, block)
            if found is not None:  # every row has the weight of one term, so that any split of a batch has the same mean
                weighted = [x * (part.share * part.scale).to(x.dtype) for x in found]
                sums = weighted if sums is None else [x + y for x, y in zip(sums, weighted, strict=True)]
        if sums is None:
            return _absent(block)
        A, count, B = sums
        return {"A": A / torch.where(count == 0, 1.0, count), "B": B}

    def _sums(self, part: Part, block: Block) -> tuple[Tensor, Tensor, Tensor] | None:
        """(sum of a a^T, the number of its rows, sum of g g^T) over the calls of one part."""
        rows, ones = [], []
        bias = block.names[-1] if block.homogeneous else None
        for layer, seen in block.calls(part):
            if self.sharing == "reduce":
                check_examples(seen, leading_size(seen) if seen.rows is None else seen.batch)
            rows.append(layer.rule.rows(seen))
            ones.append(1.0 if bias in layer.parameters.values() else 0.0)
        if not rows:
            return None
        if isinstance(rows[0].a, OneHot):
            counts = _counts([r.a for r in rows if isinstance(r.a, OneHot)], rows[0].g.dtype)
            return counts, counts.sum(), _second_moment([_flat_grad(r.g) for r in rows])
        inputs = [_append(r.a, one) if bias else r.a for r, one in zip(rows, ones, strict=True) if isinstance(r.a, Tensor)]
        if self.sharing == "reduce":
            positions = sum(a.shape[2] for a in inputs)
            reduced = torch.stack([a.sum(2) for a in inputs]).sum(0) / positions
            grads = torch.stack([r.g.sum(3) for r in rows]).sum(0)
            return _second_moment([reduced]), _count([reduced]), _second_moment([_flat_grad(grads.unsqueeze(3))])
        flat = [a.flatten(1, 2) for a in inputs]
        return _second_moment(flat), _count(flat), _second_moment([_flat_grad(r.g) for r in rows])

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        A, B = statistics["A"], statistics["B"]
        if not _owner_rule(block).joint:  # weight stored input first
            return Kronecker(Diagonal(A), B)
        return Kronecker(B, A)

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return sum(s.numel() for s in _absent(block).values()) * itemsize


def _owner_rule(block: Block) -> LayerRule:
    return next(iter(block.layers.values())).rule


def _append(a: Tensor, one: float) -> Tensor:
    """The homogeneous coordinate; 0 for a use of a tied weight that has no share in the block's bias."""
    return torch.cat([a, a.new_full((*a.shape[:-1], 1), one)], dim=-1)


def _flat_grad(g: Tensor) -> Tensor:
    """(K, G, N, R, out) -> (G, K N R, out)."""
    return g.transpose(0, 1).flatten(1, 3)


def _second_moment(rows: list[Tensor]) -> Tensor:
    """Sum over rows of x x^T: (G, n, d) -> (G, d, d), (d, d) for one group."""
    total = torch.stack([x.transpose(1, 2) @ x for x in rows]).sum(0) if len(rows) > 1 else rows[0].transpose(1, 2) @ rows[0]
    return total.squeeze(0) if total.shape[0] == 1 else total


def _counts(hot: list[OneHot], dtype: torch.dtype) -> Tensor:
    """How often each index occurs among the rows that count."""
    total = torch.zeros(hot[0].size, dtype=dtype, device=hot[0].index.device)
    for h in hot:
        total.index_add_(0, h.index.reshape(-1), h.mask.reshape(-1).to(dtype))
    return total


def _count(rows: list[Tensor]) -> Tensor:
    """The number of rows in (G, n, d), a 0-dim tensor."""
    return rows[0].new_full((), sum(x.shape[1] for x in rows))


def _absent(block: Block) -> dict[str, Tensor]:
    """Zero factors, for a layer that nothing came back to in this step."""
    layer = next(iter(block.layers.values()))
    assert block.rows is not None
    rows, width = block.shape
    if not layer.rule.joint:
        return {"A": zeros(block, rows), "B": zeros(block, width, width)}
    groups = int(getattr(layer.module, "groups", 1))
    lead = (groups,) if groups > 1 else ()
    out = rows // groups
    return {"A": zeros(block, *lead, width, width), "B": zeros(block, *lead, out, out)}
