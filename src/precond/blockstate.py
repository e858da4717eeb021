"""The state of one block over steps: its statistics, its solver's state, and what failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from precond import numerics
from precond.damping import Damping
from precond.errors import RefreshFailure, SolverFailure
from precond.history import WEIGHT, History
from precond.operators import Operator
from precond.plan import BlockPlan


@dataclass
class BlockState:
    """Statistics, solver state and failures of one block."""

    plan: BlockPlan
    history: History
    statistics: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] | None = None
    failures: int = 0
    live: Operator | None = None
    level: dict[str, Any] = field(default_factory=dict)
    """What a damping that adapts keeps."""
    before: dict[str, Any] | None = None
    """The solver's state before the direction of this step."""
    damping: Damping | None = None
    """The damping of the last refresh, its value a number."""

    def __post_init__(self) -> None:
        self.spec = dict(self.plan.repr.statistics(self.plan.block))
        if self.plan.matrix.centred:
            self.spec |= self.plan.repr.centring()

    @property
    def name(self) -> str:
        """The block's name."""
        return self.plan.block.name

    def operator(self) -> Operator:
        """The operator that the present statistics stand for."""
        return self.plan.matrix.finish(self.plan.repr.operator(self.history.read(self.statistics, self.spec), self.plan.block))

    def measured(self) -> bool:
        """Whether anything valid was ever observed (waits for the device: for refreshes only)."""
        weights = [self.statistics.get(name + WEIGHT) for name, stat in self.spec.items() if stat.kind not in ("local", "state")]
        if not weights:
            return all(name in self.statistics for name in self.spec)
        return all(w is not None and bool((w > 0).any()) for w in weights)

    def prepare(self, stage: str) -> None:
        """What the representation does before a stage is measured."""
        averages = lambda: self.history.read(self.statistics, self.spec)  # noqa: E731  # most representations never ask
        self.statistics = self.plan.repr.prepare(stage, self.statistics, averages, self.plan.block)

    def merge(self, new: dict[str, Any], valid: Tensor) -> None:
        self.statistics = self.history.merge(self.statistics, new, self.spec, valid)

    def refresh(self, limit: int, damping: Damping | None = None) -> str | None:
        """Climb the ladder with the damping of this step; returns the rung that held.

        "kept" stands for the last good state, None for nothing to refresh from.
        """
        if not self.measured():
            return None
        self.statistics = self.plan.repr.rebase(self.statistics)
        self.damping = self.plan.damping.at() if damping is None else damping
        operator, solver, old = self.operator(), self.plan.solver, self.state
        self.live = operator if operator.live else None
        try:
            self.state, rung = numerics.climb(
                lambda op, damping: solver.init(op, damping) if old is None else solver.refresh(old, op, damping), operator, self.damping
            )
        except SolverFailure as error:
            self.failures += 1
            if self.failures > limit:
                raise RefreshFailure(self._complaint(operator, limit, error)) from error
            return "kept"
        self.failures = 0
        return rung

    def _complaint(self, operator: Operator, limit: int, error: Exception) -> str:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.statistics.items() if isinstance(t, Tensor) and t.dim())
        return (
            f"block {self.plan.block.name!r} ({self.plan.triple}, {operator.kind} of {operator.n}; {shapes}) could not be refreshed {limit + 1} "
            f"times in a row. Raise damping (now {self.damping}), lower the learning rate, or leave the block out with "
            f"overrides={{{self.plan.block.name!r}: None}}. The last failure: {error}"
        )

    def apply(self, vector: Tensor) -> Tensor:
        """The preconditioned vector; the vector itself while there is no state."""
        if self.state is None:
            return vector
        self.before = self.state
        direction, self.state = self.plan.solver.apply(self.state, vector, self.live)
        return direction

    def settle(self, good: Tensor) -> None:
        """After a direction: where it was not good, what the solver carries from step to step is as it was. Never waits for the device."""
        if self.state is not None and self.before is not None and self.state is not self.before:
            self.state = _carried(good, self.state, self.before)
        self.before = None

    def end_step(self) -> None:
        """Drop what lives one step."""
        self.live = None
        for name, stat in self.spec.items():
            if stat.kind == "local":
                self.statistics.pop(name, None)

    def bytes_held(self) -> int:
        """Bytes of all tensors kept."""
        return sum(t.numel() * t.element_size() for t in _tensors((self.statistics, self.state)))


def _carried(good: Tensor, new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The new tensors of a state where a direction was good, else the old ones, and zeros where there were none."""
    result = dict(new)
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            result[name] = _carried(good, value, before)
        elif isinstance(value, Tensor) and value is not before and value.is_floating_point():
            same = isinstance(before, Tensor) and before.shape == value.shape
            result[name] = torch.where(good.to(value.device), value, before if same and before is not None else torch.zeros_like(value))
    return result


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in _tensors(value)]
    if isinstance(tree, tuple):
        return [t for value in tree for t in _tensors(value)]
    return []


def finite(tensors: dict[str, Any], device: torch.device) -> Tensor:
    """Whether every tensor entry is finite, on the device."""
    found = [t for t in tensors.values() if isinstance(t, Tensor)]
    return numerics.all_finite(found) if found else torch.ones((), dtype=torch.bool, device=device)
