"""What representations become where C is known by secant pairs: matrices that each pair makes from the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Kind, Observation, Pair, Slope
from precond.operators import Diagonal, Operator, Secant
from precond.representations.base import Representation, Statistics, refuse_kind, zeros
from precond.representations.fitted import over_probes
from precond.representations.hosted import Hosted
from precond.secant import PairRule
from precond.statistics import Stat

Division = Literal["whole", "rows", "entries"]


@dataclass(frozen=True, kw_only=True)
class DenseSecant(Hosted):
    """B of a block from pairs in the space of its parameters.

    host: whose name and scope it has. division: one matrix a block, a stack of one a row, each made from its part of the
    pairs, or one number an entry. B is made from the one before, so it is no average: it starts as I and lives on, whatever the history.
    """

    requests: ClassVar[tuple[Kind, ...]] = ("secant",)
    stages: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ("pair",)
    averaged: ClassVar[bool] = False

    host: Representation
    division: Division = "whole"

    @property
    def structure(self) -> type[Operator]:  # type: ignore[override]
        return Diagonal if self.division == "entries" else Secant

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return dict.fromkeys(("matrix", "s", "y", "pairs"), Stat("state"))

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, Pair):
            raise refuse_kind(self, observation)
        return self._follow(block.gather(observation.s), block.gather(observation.y), observation.rule, block, statistics)

    def _follow(self, s: Tensor, y: Tensor, rule: PairRule, block: Block, statistics: Statistics) -> Statistics:
        """The statistics after a pair; what the pair adds to a running average, where there is one, does not count it twice."""
        start = statistics or self._start(block)
        s, y = (self._divide(v.to(start["s"].dtype), block) for v in (s, y))
        s, y = (rule.decay * start[name] + (1 - rule.decay) * v for name, v in (("s", s), ("y", y)))
        matrix, counts = rule.direct(start["matrix"], s, y, start["pairs"] == 0)
        return {"matrix": matrix, "s": s, "y": y, "pairs": start["pairs"] + counts}

    def _start(self, block: Block) -> Statistics:
        s = self._divide(zeros(block, block.n), block)
        eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device).expand(*s.shape, s.shape[-1]).clone()
        return {"matrix": eye, "s": s, "y": s, "pairs": torch.zeros(s.shape[:-1], dtype=torch.int64, device=s.device)}

    def _divide(self, v: Tensor, block: Block) -> Tensor:
        if self.division == "rows":
            return v.view(block.shape)
        return v.unsqueeze(1) if self.division == "entries" else v

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        if self.division == "entries":
            return Diagonal(statistics["matrix"].flatten())
        return Secant(statistics["matrix"], statistics["s"], statistics["y"])

    def bytes_held(self, block: Block, itemsize: int) -> int:
        rows, width = {"whole": (1, block.n), "entries": (block.n, 1)}.get(self.division, block.shape)
        return rows * width * (width + 2) * itemsize


@dataclass(frozen=True, kw_only=True)
class SuccessiveSecant(DenseSecant):
    """The same from the gradients of successive steps, the last of which is kept."""

    requests: ClassVar[tuple[Kind, ...]] = ("successive",)
    stages: ClassVar[tuple[str, ...]] = ("pair",)
    after: ClassVar[tuple[str, ...]] = ()

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return dict(super().statistics(block)) | dict.fromkeys(("point", "gradient"), Stat("state"))

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, Slope):
            raise refuse_kind(self, observation)
        now = {"point": block.gather(observation.point).clone(), "gradient": block.gather(observation.gradient)}
        if not statistics:
            return self._start(block) | now
        step, change = now["point"] - statistics["point"], now["gradient"] - statistics["gradient"]
        return self._follow(step, change, observation.rule, block, statistics) | now

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return super().bytes_held(block, itemsize) + 2 * block.n * itemsize


def over_pairs(host: Representation, kind: Kind, division: Division = "whole") -> Representation:
    """The host where its kind of observation is a pair, itself otherwise."""
    if kind == "secant":
        return DenseSecant(host=host, division=division)
    return SuccessiveSecant(host=host, division=division) if kind == "successive" else over_probes(host, kind)
