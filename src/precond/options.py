"""The options of a preconditioner that are no axis, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from precond import history as histories
from precond import schedule
from precond.errors import InvalidCombination
from precond.history import History, Local
from precond.layers import ROW_LAYOUTS
from precond.observe import SHARED, Kind
from precond.planning import Overrides
from precond.representations import Representation
from precond.schedule import Schedule
from precond.solvers import Solver
from precond.transforms import Transform

Interval = int | Callable[[int], bool]
LossWeights = Literal["normalised", "given"]
OnNonfinite = Literal["zero", "skip", "raise"]
BeforeStart = Literal["gradient", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is not an axis. See `Preconditioner` for the meaning of each."""

    transforms: tuple[Transform, ...]
    history: History
    curvature: Schedule
    solver: Schedule
    start_step: int
    before_start: BeforeStart
    overrides: Overrides | None
    strict: bool
    loss_weights: LossWeights
    on_nonfinite: OnNonfinite
    rows: Mapping[str, str]
    self_check: bool


def make_options(
    representation: Representation, solver: Solver, kind: Kind, *, transforms: Sequence[Transform] | None, history: str | float | History,
    curvature_interval: Interval, solver_interval: Interval | None, start_step: int, before_start: BeforeStart, overrides: Overrides | None, strict: bool,
    loss_weights: LossWeights, on_nonfinite: OnNonfinite, rows: Mapping[str, str] | None, self_check: bool,
) -> Options:  # fmt: skip
    """Options from the arguments of `Preconditioner`; raises one sentence for a value that has no meaning."""
    resolved = histories.resolve(history)
    check_history(resolved, representation, solver, kind)
    if not representation.averaged and not isinstance(resolved, Local):
        raise InvalidCombination(
            f"representation {representation.name!r} holds pairs here, which are averaged in the matrix or by the solver that follows them: use "
            "history='local'."
        )
    if representation.live and (curvature_interval != 1 or solver_interval not in (None, 1)):
        raise InvalidCombination(
            f"representation {representation.name!r} lives one step, so an older one cannot be applied: curvature_interval and "
            "solver_interval must be 1."
        )
    if start_step < 0:
        raise ValueError(f"start_step={start_step}: it is a number of steps, 0 or more.")
    _one_of("loss_weights", loss_weights, ("normalised", "given"))
    _one_of("before_start", before_start, ("gradient", "nothing"))
    _one_of("on_nonfinite", on_nonfinite, ("zero", "skip", "raise"))
    for pattern, layout in (rows or {}).items():
        if layout not in (*ROW_LAYOUTS, SHARED):
            raise ValueError(f"rows={{{pattern!r}: {layout!r}}}: choose one of {', '.join(map(repr, (*ROW_LAYOUTS, SHARED)))}.")
    return Options(
        transforms=tuple(transforms or ()), history=resolved, curvature=schedule.resolve(curvature_interval),
        solver=schedule.resolve(curvature_interval if solver_interval is None else solver_interval), start_step=start_step,
        before_start=before_start,
        overrides=overrides, strict=strict, loss_weights=loss_weights, on_nonfinite=on_nonfinite, rows=dict(rows or {}), self_check=self_check,
    )  # fmt: skip


def check_history(history: History, representation: Representation, solver: Solver, kind: Kind) -> None:
    """A representation that lives one step averages nothing, and rows only where their number is bounded; a solver may average by itself.

    What a solver follows is no average, and what is kept beside it (the input moment of K-BFGS) is the history's.
    """
    if solver.averages and kind not in solver.follows and not isinstance(history, Local):
        raise InvalidCombination(
            f"solver {solver.name!r} averages in its own state, which a history would do a second time: use history='local', and the options of the "
            "solver for how fast it forgets."
        )
    if representation.live and not isinstance(history, Local):
        raise InvalidCombination(
            f"representation {representation.name!r} holds products that live one step, so nothing can be averaged: use history='local'."
        )
    if representation.rows is not None and not history.supports(representation.rows):
        raise InvalidCombination(
            f"representation {representation.name!r} keeps rows, whose number would grow without end under a {type(history).__name__} history: use "
            "history='local' or Window(m), or a low-rank representation with a rank, an energy or a tolerance (and no initial value of a Sum)."
        )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}.")
