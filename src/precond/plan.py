"""Which block has which triple, and what it needs to observe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from precond.blocks import Block
from precond.damping import Damping
from precond.matrices import Matrix
from precond.observe import Demand, Kind, SelfCheck
from precond.partition import Partition
from precond.representations import Representation
from precond.solvers import Solver


@dataclass(frozen=True)
class BlockPlan:
    """A block with its members; `note` says why it has not the representation that the user named, where it has not."""

    block: Block
    matrix: Matrix
    repr: Representation
    solver: Solver
    damping: Damping
    kind: Kind
    demand: int
    note: str | None = None
    beside: Mapping[str, int] = field(default_factory=dict)

    def source(self, stage: str) -> int:
        """The number of the demand that a stage is measured from."""
        return self.beside.get(stage, self.demand)

    @property
    def triple(self) -> str:
        return f"{self.matrix.name} x {self.repr.name} x {self.solver.name}"


@dataclass(frozen=True)
class Plan:
    """All blocks, the demands they put on the observer, and the parameters that are left as they are, with the reason."""

    partition: Partition
    blocks: tuple[BlockPlan, ...]
    demands: tuple[Demand, ...]
    left: Mapping[str, str]

    def observed_layers(self) -> dict[str, nn.Module]:
        names = frozenset().union(*(d.layers for d in self.demands if d.kind in ("columns", "factors", "layer_secant")))
        return {n: layer.module for n, layer in self.partition.layers.items() if n in names}

    def selfcheck(self) -> SelfCheck | None:
        """Compares the gradients of blocks made of columns with what the calls of their layers explain."""
        names = {p.name: b.block.name for b in self.blocks if b.kind == "columns" for p in b.block.parameters}
        layers = self.partition.layers
        return SelfCheck(lambda seen: layers[seen.name].total(seen), names) if names and self.observed_layers() else None
