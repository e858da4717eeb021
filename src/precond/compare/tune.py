"""Every contender's learning rate, from grids of the same size and runs of the same length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from precond.compare.contenders import Contender
from precond.compare.run import Budget, Run, train
from precond.compare.tasks import Task
from precond.errors import UsageError

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How learning rates are chosen.

    Attributes:
        points: grid points, half a decade apart, centred on the rate the contender is known for; 1 means no tuning.
        fraction: the length of a tuning run over that of a full one. The rate that is best early is often too large
            for the whole budget, so that shorter runs are cheaper and choose worse.
    """

    points: int = 5
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.points < 1 or not 0 < self.fraction <= 1:
            raise UsageError(f"a grid needs at least one point and a fraction in (0, 1], not {self.points} and {self.fraction}.")

    def grid(self, contender: Contender) -> list[float]:
        """The rates tried; only the given one where the user fixed it."""
        points = 1 if contender.fixed else self.points
        return [float(f"{contender.lr * 10 ** ((i - (points - 1) / 2) / 2):.3g}") for i in range(points)]

    def budget(self, full: Budget) -> Budget:
        """The budget of one tuning run."""
        return Budget(steps=max(1, round(self.fraction * full.steps)), batch_size=full.batch_size)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The rate chosen for one contender on one task, and how its rivals did.

    Attributes:
        scores: the training loss at the end of each tuning run, `None` where the run failed.
        at_edge: the best rate is the smallest or largest tried, so a better one may lie outside.
    """

    task: str
    contender: str
    grid: list[float]
    scores: list[float | None]
    lr: float
    at_edge: bool


def tune(
    task: Task, contender: Contender, *, tuning: Tuning, budget: Budget, device: torch.device, on_step: Callable[[float], None]
) -> Tuned:
    """Try the grid on seed 0 and take the rate with the lowest training loss at the end; test data is not looked at."""
    grid = tuning.grid(contender)
    if len(grid) == 1:
        return Tuned(task=task.name, contender=contender.label, grid=grid, scores=[None], lr=grid[0], at_edge=False)
    tried = tuning.budget(budget)
    runs = [train(task, contender, lr=lr, seed=SEED, budget=tried, device=device, on_step=on_step, evaluate=False) for lr in grid]
    scores = [_final_loss(run) for run in runs]
    order = [math.inf if score is None else score for score in scores]
    best = int(np.argmin(order)) if min(order) < math.inf else len(grid) // 2
    return Tuned(task=task.name, contender=contender.label, grid=grid, scores=scores, lr=grid[best], at_edge=best in (0, len(grid) - 1))


def _final_loss(run: Run) -> float | None:
    """The mean loss of the last quarter of a run; `None` for one that failed."""
    if run.failure is not None:
        return None
    return float(np.mean(run.losses[-max(1, len(run.losses) // 4) :]))
