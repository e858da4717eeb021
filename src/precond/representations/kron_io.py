"""Kronecker product of an input and an output factor: K-FAC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.blocks import Block
from precond.errors import ObservationError
from precond.layers import Rule as LayerRule
from precond.observe import Columns, Factors, Kind, Observation, Part
from precond.operators import Diagonal, Fit, Kronecker, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, refuse_kind, zeros
from precond.representations.fitted import PROBES, over_probes
from precond.representations.inputs import (
    InputRows,
    averaged,
    direct_moment,
    few_examples,
    input_rows,
    input_sums,
    is_shared,
    second_moment,
)
from precond.representations.kron_secant import KronSecant
from precond.representations.kron_structure import KronStructured, Structure
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

    input, output: the structure in which A and B are held. "dense"; "diagonal"; "block": blocks on the diagonal, as few of at most
    `block_size` as there can be, as equal as they can be; "identity": I, and nothing is kept (output="identity": FOOF); "rank_one": m m^T of
    the mean row m, which is averaged in its place, for B times the weight of all rows, 1 for a mean loss and one position (both: Eva);
    "rows": the rows themselves, at most in' or out of them, for the 'smw' solver (both: SKFAC). Of one-hot inputs "block" and "rows" are
    diagonal, as all of A is.

    memory: of secant pairs (K-BFGS), None for a dense B, or of how many of them it is made, from I, as in L-BFGS: K-BFGS(L).

    Memory in'^2 + out^2; cost N R (in'^2 + K out^2). Sources: Martens & Grosse 2015; Grosse & Martens 2016;
    Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures", 2023; Benzing 2022 (FOOF); Zhang,
    Shi & Li 2023 (Eva); Tang et al. 2021 (SKFAC).

    >>> KronIO(sharing="reduce").sharing
    'reduce'
    """

    scope = "matrix"
    structure = Kronecker
    fit = "kronecker"

    sharing: Literal["expand", "reduce"] = "expand"
    packed: Literal["split", "joint"] = "split"
    input: Structure = "dense"
    output: Structure = "dense"
    block_size: int = 30
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and (isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1):
            raise ValueError(f"KronIO(memory={self.memory!r}): it is a number of pairs, 1 or more, or None.")
        if self.packed not in ("split", "joint"):
            raise ValueError(f"KronIO(packed={self.packed!r}): choose 'split' or 'joint'.")
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"KronIO(sharing={self.sharing!r}): choose 'expand' or 'reduce'.")
        for name, structure in (("input", self.input), ("output", self.output)):
            if structure not in get_args(Structure):
                raise ValueError(f"KronIO({name}={structure!r}): choose one of {', '.join(map(repr, get_args(Structure)))}.")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"KronIO(block_size={self.block_size!r}): it is a length, 1 or more.")

    @property
    def _plain(self) -> bool:
        return self.input == self.output == "dense"

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]
        return ("columns", "factors", "layer_secant") if self._plain else ("columns", "factors")

    @property
    def followed(self) -> tuple[Kind, ...]:  # type: ignore[override]
        return PROBES if self._plain else ()

    def over(self, kind: Kind) -> Representation:
        if kind == "layer_secant":
            return KronSecant(host=self, memory=self.memory)
        return over_probes(self, kind) if self._plain else KronStructured(host=self)

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
        grads = self.output_rows(part, block)
        if not grads:
            return {}
        moments = self._moments(part, block, grads[0].dtype) if part.first else None
        outputs = {"B": second_moment([g.transpose(0, 1).flatten(1, 2) for g in grads])}
        return outputs if moments is None else {"A": moments[0], "rows": moments[1], **outputs}

    def output_rows(self, part: Part, block: Block) -> list[Tensor]:
        """The rows of B of every call, (K, G, N, R, out)."""
        grads = [layer.rule.outputs(seen) for layer, seen in block.calls(part)]
        if self._joins(block):
            grads = [g.movedim(1, 3).flatten(3).unsqueeze(1) for g in grads]
        if self.sharing == "reduce" and grads:
            grads = [torch.stack([g.sum(3) for g in grads]).sum(0).unsqueeze(3)]
        return grads

    def _moments(self, part: Part, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(sum of a a^T, the number of its rows)."""
        total, part = self.direct_moment(part, block)
        for inputs in self.input_rows(part, block):
            found = input_sums(inputs, dtype)
            total = found if total is None else (total[0].add_(found[0]), total[1] + found[1])
        return total

    def direct_moment(self, part: Part, block: Block) -> tuple[tuple[Tensor, Tensor] | None, Part]:
        """(sum of a a^T, the number of rows) of the calls that need no rows for it, and the part without them."""
        return direct_moment(part, block) if self.sharing == "expand" else (None, part)

    def input_rows(self, part: Part, block: Block) -> Iterator[list[InputRows]]:
        """The rows of A of every call, of few examples at a time."""
        if self.sharing == "reduce":
            for layer, seen in block.calls(part):
                layer.rule.check(seen)
        for piece in few_examples(part, block):
            inputs = input_rows(piece, block)
            if not inputs:
                continue
            if self._joins(block):
                inputs = [_one_input(a, block) for a in inputs]
            yield averaged(inputs) if self.sharing == "reduce" else inputs  # first averaged over positions

    def _joins(self, block: Block) -> bool:
        return self.packed == "joint" and _owner_rule(block).packed

    def groups(self, block: Block) -> int:
        """How many pairs of factors a block has."""
        layer = next(iter(block.layers.values()))
        return 1 if self._joins(block) else layer.rule.groups(layer.module)

    def _absent(self, block: Block) -> dict[str, Tensor]:
        """Zero factors, for a layer that nothing came back to in this step."""
        layer = next(iter(block.layers.values()))
        assert block.rows is not None
        rows, width = block.shape
        groups = self.groups(block)
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
