"""What `kron_io` becomes where its factors have a structure: FOOF, SKFAC, Eva."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from precond.blocks import Block
from precond.errors import ObservationError
from precond.layers import OneHot, Ragged, Rule
from precond.observe import Columns, Factors, Observation, Part
from precond.operators import BlockDiagonal, Dense, Diagonal, Gram, Kronecker, LowRank, Operator
from precond.representations import hosted
from precond.representations.base import Statistics, refuse_kind, zeros
from precond.representations.hosted import Hosted
from precond.representations.inputs import InputRows, count, second_moment
from precond.representations.outputs import output_moment
from precond.statistics import Form, Stat
from precond.tiling import Tiling, even_pieces

Structure = Literal["dense", "diagonal", "block", "identity", "rank_one", "rows"]
Sizes = dict[str, tuple[int, ...]]


class Host(hosted.Host, Protocol):
    """The options and the observed rows of `kron_io`."""

    @property
    def sharing(self) -> str: ...
    @property
    def input(self) -> Structure: ...
    @property
    def output(self) -> Structure: ...
    @property
    def block_size(self) -> int: ...
    def hosts(self, block: Block) -> str | None: ...
    def fallback(self, block: Block) -> str: ...
    def groups(self, block: Block) -> int: ...
    def direct_moment(self, part: Part, block: Block) -> tuple[tuple[Tensor, Tensor] | None, Part]: ...
    def input_rows(self, part: Part, block: Block) -> Iterator[list[InputRows]]: ...
    def output_rows(self, part: Part, block: Block) -> list[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class KronStructured(Hosted):
    """C_l ~ B (x) A with the factors of `kron_io` restricted to their structures; see there.

    A factor of rank one is exceeded by the dense one by a positive semi-definite matrix; two are a `Gram` of one row, g a^T, never formed. More
    rows than columns are replaced by the triangle of their QR factorisation.
    """

    requests = ("columns", "factors")

    host: Host

    @property
    def structure(self) -> type[Operator]:  # type: ignore[override]
        return Gram if self.host.input == self.host.output == "rank_one" else Kronecker

    @property
    def rows(self) -> Stat | None:
        return Stat("rows") if "rows" in (self.host.input, self.host.output) else None

    def hosts(self, block: Block) -> str | None:
        reason = self.host.hosts(block)
        if reason is None and "block" in (self.host.input, self.host.output) and self.host.groups(block) > 1:
            return "its factors are a stack, one a group, which has no further blocks"
        return reason

    def fallback(self, block: Block) -> str:
        return self.host.fallback(block)

    def remark(self, shape: tuple[int, ...]) -> str | None:
        words = {"diagonal": "diagonal", "block": f"in blocks of at most {self.host.block_size}", "identity": "the identity",
            "rank_one": "of rank one", "rows": "by its rows"}  # fmt: skip
        sides = (("input", self.host.input), ("output", self.host.output))
        return ", ".join(f"{side} factor {words[structure]}" for side, structure in sides if structure in words) or None

    def _side(self, name: str, block: Block) -> tuple[Structure, tuple[int, ...], int]:
        """The structure of a factor, the leading dimension of its stack, and its size."""
        rows, width = block.shape
        groups, first, hot = self.host.groups(block), not _rule(block).joint, _rule(block).one_hot
        outer = rows if hot else rows // groups
        lead = (groups,) if groups > 1 else ()
        if name == "B":
            return self.host.output, lead, width if first else outer
        structure = self.host.input
        if hot and structure in ("dense", "block", "rows"):
            structure = "diagonal"  # which is all that products of one-hot rows have
        return structure, lead, outer if first else width

    def _tiling(self, size: int) -> Tiling:
        return Tiling((size,), (even_pieces(size, self.host.block_size),))

    def _shapes(self, name: str, block: Block) -> Sizes:
        """The entries of a factor and their shapes."""
        structure, lead, n = self._side(name, block)
        if structure == "block":
            return {f"{name}{g}": (b, s, s) for g, (b, s) in enumerate(self._tiling(n).groups)}
        ends = {"dense": (*lead, n, n), "diagonal": (*lead, n), "rank_one": (*lead, n), "rows": (1, *lead, n)}
        return {name: ends[structure]} if structure in ends else {}

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        found = {"rows": Stat("mean")}
        for side in ("A", "B"):
            structure = self._side(side, block)[0]
            form: Form = "diagonal" if structure == "diagonal" else "plain" if structure in ("rank_one", "rows") else "matrix"
            found |= {name: Stat("rows" if structure == "rows" else "mean", form=form) for name in self._shapes(side, block)}
        return found

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, (Columns, Factors)):
            raise refuse_kind(self, observation)
        sums: Statistics = {}
        for part in observation.parts:
            self._add(sums, self._inputs(part, block) if part.first else {}, part)
            if isinstance(observation, Columns):
                self._add(sums, self._outputs(part, block), part)
        if isinstance(observation, Factors):
            sums |= self._given(observation, block)
        shapes: Sizes = {"rows": (self.host.groups(block), 1, 1) if self.host.groups(block) > 1 else ()}
        shapes |= self._shapes("A", block) | self._shapes("B", block)
        return {name: sums[name] if name in sums else zeros(block, *shape) for name, shape in shapes.items()}

    @staticmethod
    def _add(sums: Statistics, found: Statistics, part: Part) -> None:
        weight = part.share * part.scale
        for name, (value, joined) in found.items():
            value = value * (weight.abs().sqrt() if joined else weight).to(value.dtype)
            if name in sums:
                value = _fewer(torch.cat([sums[name], value])) if joined else sums[name] + value
            sums[name] = value

    def _inputs(self, part: Part, block: Block) -> Statistics:
        """Name -> (value, whether it is rows), and the number of rows."""
        structure, _, size = self._side("A", block)
        found: Statistics = {}
        if structure == "dense":
            direct, part = self.host.direct_moment(part, block)
            found = {"A": (direct[0], False), "rows": (direct[1].to(zeros(block).dtype), False)} if direct else {}
        for inputs in self.host.input_rows(part, block):
            if not inputs:
                continue
            hot = [x for x in inputs if isinstance(x, OneHot)]
            if hot:
                total = zeros(block, size)
                for x in hot:
                    total.index_add_(0, x.index.reshape(-1), x.mask.reshape(-1).to(total.dtype))
                values = {"A": (total, False)} if structure != "identity" else {}
                number = total.sum()
            else:
                plain = [x.a if isinstance(x, Ragged) else x for x in inputs if not isinstance(x, OneHot)]
                values, number = self._moments("A", structure, plain), count(inputs)
            for name, (value, joined) in (values | {"rows": (number.to(zeros(block).dtype), False)}).items():
                old = found.get(name)
                found[name] = (value if old is None else torch.cat([old[0], value]) if joined else old[0] + value, joined)
        return found

    def _outputs(self, part: Part, block: Block) -> Statistics:
        structure = self._side("B", block)[0]
        grads = self.host.output_rows(part, block) if structure != "identity" else []
        if structure == "rank_one" and grads and (not part.first or any(g.shape[0] > 1 for g in grads)):
            raise ObservationError(
                "KronIO(output='rank_one') is made of one mean gradient, but the matrix sends several columns back: use 'empirical_fisher' or "
                "'fisher_mc' with one sample."
            )
        return self._moments("B", structure, [g.transpose(0, 1).flatten(1, 2) for g in grads]) if grads else {}

    def _moments(self, name: str, structure: Structure, rows: Sequence[Tensor]) -> Statistics:
        """Name -> (value, whether it is rows), of rows (G, M, R, d)."""
        if structure == "identity":
            return {}
        if structure == "dense":
            return {name: (second_moment(rows), False)}
        flat = torch.cat([x.flatten(1, 2) for x in rows], 1)
        if structure == "block":
            parts = self._tiling(flat.shape[-1]).split(self._tiling(flat.shape[-1]).arrange(flat[0]))
            return {f"{name}{g}": (torch.einsum("nbi,nbj->bij", x, x), False) for g, x in enumerate(parts)}
        flat = flat[0] if len(flat) == 1 else flat
        if structure == "rows":
            return {name: (_fewer(flat.movedim(-2, 0)), True)}
        return {name: ((flat.square() if structure == "diagonal" else flat).sum(-2), False)}

    def _given(self, observation: Factors, block: Block) -> Statistics:
        """B of an observation that has moments in place of columns, restricted to its structure."""
        structure, lead, n = self._side("B", block)
        if structure == "identity":
            return {}
        if structure in ("rank_one", "rows"):
            raise ObservationError(
                f"KronIO(output={structure!r}) is made of output gradients, which this matrix has not: use output='identity'."
            )
        like = zeros(block)
        eye = torch.eye(n, dtype=like.dtype, device=like.device).expand(*lead, n, n)
        B = eye if observation.outputs is None else output_moment(observation, block, summed=self.host.sharing == "reduce")
        if B is None:
            return {}
        B = B.to(like.dtype)
        if structure == "dense":
            return {"B": B.clone()}
        if structure == "diagonal":
            return {"B": B.diagonal(dim1=-2, dim2=-1).clone()}
        found, start = {}, 0
        for g, (b, s) in enumerate(self._tiling(n).groups):
            inside = B[start : start + b * s, start : start + b * s].reshape(b, s, b, s)
            found[f"B{g}"], start = inside.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone(), start + b * s
        return found

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        number = statistics["rows"]
        number = torch.where(number > 0, number, torch.ones_like(number))
        A, B = self._factor("A", statistics, number, block), self._factor("B", statistics, number, block)
        first = not _rule(block).joint
        if isinstance(A, LowRank) and isinstance(B, LowRank) and self.structure is Gram:
            inner, outer = (B, A) if first else (A, B)
            return Gram([(inner.rows.unsqueeze(-2), outer.rows.unsqueeze(-2))])
        return Kronecker(A, B) if first else Kronecker(B, A)

    def _factor(self, name: str, statistics: Statistics, number: Tensor, block: Block) -> Operator:
        structure, lead, n = self._side(name, block)
        if structure == "identity":
            return Diagonal(number.new_ones(()).expand(*lead, n))
        if structure == "block":
            divisor = number if name == "A" else 1.0
            return BlockDiagonal({entry: Dense(statistics[entry] / divisor) for entry in self._shapes(name, block)})
        value = statistics[name]
        if structure in ("dense", "diagonal"):
            per = number if structure == "dense" else number.squeeze(-1) if number.dim() else number
            value = value / per if name == "A" else value
            return Dense(value) if structure == "dense" else Diagonal(value)
        rows = value.unsqueeze(-2) if structure == "rank_one" else value.movedim(0, -2)
        if name == "A":
            return LowRank(rows / (number if structure == "rank_one" else number.sqrt()))
        return LowRank(rows / number.sqrt() if structure == "rank_one" else rows)

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return sum(torch.Size(shape).numel() for side in ("A", "B") for shape in self._shapes(side, block).values()) * itemsize


def _rule(block: Block) -> Rule:
    return next(iter(block.layers.values())).rule


def _fewer(rows: Tensor) -> Tensor:
    """Rows (n, *batch, d) with the same X^T X, at most d of them."""
    if rows.shape[0] <= rows.shape[-1]:
        return rows
    triangle: Tensor = torch.linalg.qr(rows.movedim(0, -2), mode="r").R
    return triangle.movedim(-2, 0)
