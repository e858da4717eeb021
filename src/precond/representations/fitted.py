"""What representations become for a solver that fits pairs: the newest pairs, and the structure to fit to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from precond.blocks import Block
from precond.observe import Kind, Observation, Probes
from precond.operators import BlockDiagonal, FitName, Operator, Pairs
from precond.representations.base import Representation, Statistics, refuse_kind
from precond.representations.hosted import Hosted
from precond.statistics import Stat


@dataclass(frozen=True, kw_only=True)
class Fitted(Hosted):
    """The pair (v, h) of the step on a block: h = C v, or of the gradient h and independent noise v.

    v is normal on all parameters, as published, so that one product of the whole matrix serves all blocks. What a block fits is then
    E[h h^T] = (C^2) of the block, rows of C outside it included, and not the square of C's block; the two are equal where C is
    block-diagonal. Averages belong to the solver, so no history is kept. Memory 2 P here; what is fitted is the solver's.

    host: whose name, scope, coordinates and structure it has.
    """

    requests: ClassVar[tuple[Kind, ...]] = ("pairs", "whitening")
    structure: ClassVar[type[Operator]] = Pairs
    averaged: ClassVar[bool] = False

    host: Representation
    whitening: bool = False

    @property
    def fit(self) -> FitName | None:  # type: ignore[override]
        return self.host.fit

    def hosts(self, block: Block) -> str | None:
        return self.host.hosts(block)

    def coordinates(self, block: Block) -> Block:
        return self.host.coordinates(block)

    def remark(self, shape: tuple[int, ...]) -> str | None:
        return self.host.remark(shape)

    def fallback(self, block: Block) -> str:
        return self.host.fallback(block)

    def centring(self) -> Mapping[str, Stat]:
        return {}

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return dict.fromkeys(("v", "h"), Stat("state"))

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, Probes):
            raise refuse_kind(self, observation)
        v, h = (block.gather(values, lead=1) for values in observation.draw("normal", 1))
        return {"v": _wide(v), "h": _wide(h)}

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        fits = self.host.fits(block)
        ends = [fit.n for fit in fits]
        pieces = zip(statistics["v"].split(ends, 1), statistics["h"].split(ends, 1), fits, strict=True)
        made = [Pairs(v, h, fit, whitening=self.whitening) for v, h, fit in pieces]
        return made[0] if len(made) == 1 else BlockDiagonal({str(g): pairs for g, pairs in enumerate(made)})

    def bytes_held(self, block: Block, itemsize: int) -> int:
        """Of what is fitted, which is more than the pair."""
        return max(2 * block.n, sum(fit.numbers for fit in self.host.fits(self.coordinates(block)))) * itemsize


PROBES: tuple[Kind, ...] = ("pairs", "whitening")


def over_probes(host: Representation, kind: Kind) -> Representation:
    """The host where a solver fits pairs to its structure, itself otherwise."""
    return Fitted(host=host, whitening=kind == "whitening") if kind in PROBES else host


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize < 4 else values
