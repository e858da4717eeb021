"""Kronecker product of an input and an output factor: K-FAC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.blocks import Block
from precond.errors import ObservationError
from precond.layers import Rule as LayerRule
from precond.observe import Columns, Factors, Kind, Observation, Part
from precond.operators import Diagonal, Fit, Kronecker, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, refuse_kind, zeros
from precond.representations.fitted import PROBES, over_probes
from precond.representations.inputs import InputRows, averaged, few_examples, input_rows, input_sums, is_shared, second_moment
from precond.representations.kron_secant import KronSecant
from precond.representations.outputs import output_moment
from precond.statistics import Form, Stat


@REGISTRY.register("kron_io")
@dataclass(frozen=True, kw_only=True)
class KronIO(Representation):
    """C_l ~ B (x) A, in coordinates vec [W, b] row-major: A (in', in') of inputs, B (out, out) of output gradients.

    sharing="expand" treats positions as independent data, A = mean over rows of a a^T, B = scale * sum_k,rows g g^T;
    "reduce" first averages a and sums g over positions. Both are plain K-FAC where a layer has one position. The bias
    is joined by a homogeneous 1 in a. What is averaged is the sum of a a^T and the number of rows, both with the weights
    of the terms, so that any split of the data over batches and ranks has the same A. Uses of a tied weight expand like positions. An Embedding's A is diagonal
    (counts) and comes first, as its weight is stored input first, and so does that of a transposed convolution, whose bias is apart; a
    grouped convolution has one pair a group. packed="split": the three projections of an `nn.MultiheadAttention` have a pair each;
    "joint": they have one A and a B of three times the size, where query, key and value are one tensor.

    Memory in'^2 + out^2; cost N R (in'^2 + K out^2). Sources: Martens & Grosse 2015; Grosse & Martens 2016;
    Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures", 2023.

    >>> KronIO(sharing="reduce").sharing
    'reduce'
    """

    scope = "matrix"
    requests = ("columns", "factors", "layer_secant")
    structure = Kronecker
    followed = PROBES
    fit = "kronecker"

    sharing: Literal["expand", "reduce"] = "expand"
    packed: Literal["split", "joint"] = "split"

    def __post_init__(self) -> None:
        if self.packed not in ("split", "joint"):
            raise ValueError(f"KronIO(packed={self.packed!r}): choose 'split' or 'joint'.")
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"KronIO(sharing={self.sharing!r}): choose 'expand' or 'reduce'.")

    def over(self, kind: Kind) -> Representation:
        return KronSecant(host=self) if kind == "layer_secant" else over_probes(self, kind)

    def fits(self, block: Block) -> tuple[Fit, ...]:
        kept = self._absent(block)
        first, second = (kept["B"], kept["A"]) if _owner_rule(block).joint else (kept["A"], kept["B"])
        groups = second.shape[0] if second.dim() > 2 else 1
        return (Fit((first.shape[-1], second.shape[-1]), ("dense" if first.dim() > 1 else "diagonal", "dense"), batch=groups),)

    def hosts(self, block: Block) -> str | None:
        owner = next(iter(block.layers.values()))
        if block.rows is None or not owner.rule.linear or owner.parameters.get("weight") not in block.names:
            return "it is no product of an input and an output gradient, so it has no Kronecker factors"
        if any(layer.rule is not owner.rule for layer in block.layers.values()):
            return "its weight is tied between layers of different kinds, where inputs and outputs exchange roles"
        if self.sharing == "reduce" and owner.rule.one_hot:
            return "averaging one-hot rows over positions needs a dense factor of the vocabulary's size"
        return None

    def fallback(self, block: Block) -> str:
        return "unit" if all(layer.rule.elementwise for layer in block.layers.values()) else "diagonal"

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        input_form: Form = "diagonal" if _owner_rule(block).one_hot else "matrix"
        return {"A": Stat("mean", form=input_form), "rows": Stat("mean"), "B": Stat("mean", form="matrix")}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if isinstance(observation, Factors):
            seen = self._absent(block)
            for part in observation.parts:
                moments = self._moments(part, block, seen["A"].dtype)
                if moments is not None:
                    weight = (part.share * part.scale).to(seen["A"].dtype)
                    seen["A"], seen["rows"] = seen["A"] + moments[0] * weight, seen["rows"] + moments[1] * weight
            if observation.outputs is None:
                return seen | {"B": _identity(seen["B"])}
            B = output_moment(observation, block, summed=self.sharing == "reduce")
            return seen if B is None else seen | {"B": B.to(seen["B"].dtype)}
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        sums: Statistics = {}
        for part in observation.parts:
            weight = part.share * part.scale  # every row has the weight of one term, so that any split of a batch has the same mean
            for name, value in self._sums(part, block).items():
                value.mul_(weight.to(value.dtype))
                sums[name] = sums[name].add_(value) if name in sums else value
        return sums or self._absent(block)

    def _sums(self, part: Part, block: Block) -> Statistics:
        """The sum of a a^T, the number of its rows, and the sum of g g^T over the calls of one part; what is new of them."""
        grads = [layer.rule.outputs(seen) for layer, seen in block.calls(part)]
        if not grads:
            return {}
        if self._joins(block):
            grads = [g.movedim(1, 3).flatten(3).unsqueeze(1) for g in grads]
        moments = self._moments(part, block, grads[0].dtype) if part.first else None
        if self.sharing == "reduce":
            grads = [torch.stack([g.sum(3) for g in grads]).sum(0).unsqueeze(3)]
        outputs = {"B": second_moment([g.transpose(0, 1).flatten(1, 2) for g in grads])}
        return outputs if moments is None else {"A": moments[0], "rows": moments[1], **outputs}

    def _moments(self, part: Part, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(sum of a a^T, the number of its rows), from few examples at a time."""
        total: tuple[Tensor, Tensor] | None = None
        if self.sharing == "reduce":
            for layer, seen in block.calls(part):
                layer.rule.check(seen)
        for piece in few_examples(part, block):
            inputs = input_rows(piece, block)
            if not inputs:
                continue
            if self._joins(block):
                inputs = [_one_input(a, block) for a in inputs]
            if self.sharing == "reduce":  # first averaged over positions
                inputs = averaged(inputs)
            found = input_sums(inputs, dtype)
            total = found if total is None else (total[0].add_(found[0]), total[1] + found[1])
        return total

    def _joins(self, block: Block) -> bool:
        return self.packed == "joint" and _owner_rule(block).packed

    def _absent(self, block: Block) -> dict[str, Tensor]:
        """Zero factors, for a layer that nothing came back to in this step."""
        layer = next(iter(block.layers.values()))
        assert block.rows is not None
        rows, width = block.shape
        groups = 1 if self._joins(block) else layer.rule.groups(layer.module)
        lead, number = ((groups,), (groups, 1, 1)) if groups > 1 else ((), ())
        left, right = (*lead, rows // groups, rows // groups), (*lead, width, width)
        if layer.rule.one_hot:
            left = (rows,)
        A, B = (right, left) if layer.rule.joint else (left, right)
        return {"A": zeros(block, *A), "rows": zeros(block, *number), "B": zeros(block, *B)}

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        rows, B = statistics["rows"], statistics["B"]
        A = statistics["A"] / torch.where(rows > 0, rows, torch.ones_like(rows))
        rule = _owner_rule(block)
        if rule.joint:
            return Kronecker(B, A)
        return Kronecker(Diagonal(A) if rule.one_hot else A, B)  # weight stored input first

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return sum(s.numel() for s in self._absent(block).values()) * itemsize


def _owner_rule(block: Block) -> LayerRule:
    return next(iter(block.layers.values())).rule


def _identity(like: Tensor) -> Tensor:
    """Identities of the shape of (*batch, n, n) matrices."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like).clone()


def _one_input(a: InputRows, block: Block) -> Tensor:
    """What all groups read."""
    if not isinstance(a, Tensor) or not is_shared(a):
        raise ObservationError(
            f"KronIO(packed='joint') at block {block.name!r}: query, key and value are not one and the same tensor there; use packed='split'."
        )
    return a[:1]
