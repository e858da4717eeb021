"""From recorded runs to the figures of a report, in pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from precond.compare.contenders import BASELINE
from precond.compare.curves import steps_to_accuracy, steps_to_loss, trailing_mean
from precond.compare.run import Run
from precond.compare.session import Results

_WORK = ("steps", "observations", "refreshes")  # counters of work done, not of trouble


@dataclass(frozen=True, kw_only=True)
class Target:
    """The level whose first crossing is timed: a training loss (mean over the last epoch's batches) or a test accuracy."""

    loss: float | None = None
    accuracy: float | None = None
    origin: str

    def steps(self, run: Run, window: int) -> int | None:
        """The step at which `run` reached it, or `None`."""
        if self.accuracy is not None:
            return steps_to_accuracy(run.accuracies, run.accuracy_steps, self.accuracy)
        return steps_to_loss(run.losses, self.loss, window) if self.loss is not None else None

    def describe(self) -> str:
        """The target in words."""
        if self.accuracy is not None:
            return f"test accuracy {100 * self.accuracy:.4g} % ({self.origin})"
        if self.loss is not None:
            return f"training loss {self.loss:.3g} ({self.origin})"
        return f"none ({self.origin})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender on one task. Means and deviations are over seeds; `None` stands for what could not be computed.

    Attributes:
        accuracy, accuracy_spread: final test accuracy, and its sample standard deviation.
        reached: how many of the `seeds` runs reached the target; the next two are means over those.
        median_step, mean_step: seconds of one step; `..._ratio` is over the baseline's. The mean
            holds the steps on which a preconditioner is refreshed, the median may not.
        memory_ratio: the peak of bytes held by tensors, over the baseline's.
        remarks: what a reader must know: failures, a rate at the edge of its grid.
    """

    task: str
    contender: str
    lr: float
    seeds: int
    accuracy: float | None
    accuracy_spread: float | None
    loss: float | None
    reached: int
    steps_to_target: float | None
    seconds_to_target: float | None
    median_step: float | None
    mean_step: float | None
    median_step_ratio: float | None
    mean_step_ratio: float | None
    memory: int | None
    memory_ratio: float | None
    remarks: list[str]


def window(results: Results, task: str) -> int:
    """The smoothing of a task's curves: as many steps as one epoch has, so that every training example counts once."""
    budget = results.settings["budgets"][task]
    return int(max(1, min(results.settings["train_examples"][task] // budget["batch_size"], budget["steps"])))


def baseline_target(results: Results, task: str) -> Target:
    """The training loss at the end of the baseline's runs, the median over seeds: one that diverged does not set it."""
    losses = [_final_loss(run, window(results, task)) for run in _complete(results.runs_of(task, baseline_label(results)))]
    if not losses:
        return Target(origin=f"no run of {BASELINE} is finished")
    return Target(loss=statistics.median(losses), origin=f"where {BASELINE} ends, median over seeds")


def baseline_label(results: Results) -> str:
    """The contender that ratios are over."""
    labels: list[str] = results.settings["contenders"]
    return next(label for label in labels if label.partition(":")[0] == BASELINE)


def rows(results: Results, task: str, target: Target) -> list[Row]:
    """A row for every contender that has a finished run on `task`, in the order they were named."""
    base = results.runs_of(task, baseline_label(results))
    labels = [label for label in results.settings["contenders"] if results.runs_of(task, label)]
    return [_row(results, task, label, target, base) for label in labels]


def _row(results: Results, task: str, label: str, target: Target, base: Sequence[Run]) -> Row:
    runs = results.runs_of(task, label)
    complete = _complete(runs)
    accuracies = [run.accuracies[-1] for run in complete]
    span = window(results, task)
    reached = [(run, steps) for run in runs if (steps := target.steps(run, span)) is not None]
    memory = results.memory.get(task, {})
    return Row(
        task=task,
        contender=label,
        lr=runs[0].lr,
        seeds=len(runs),
        accuracy=_mean(accuracies),
        accuracy_spread=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        loss=_mean([_final_loss(run, span) for run in complete]),
        reached=len(reached),
        steps_to_target=_mean([float(steps) for _, steps in reached]),
        seconds_to_target=_mean([sum(run.seconds[:steps]) for run, steps in reached]),
        median_step=_median_step(runs),
        mean_step=_mean_step(runs),
        median_step_ratio=_ratio(_median_step(runs), _median_step(base)),
        mean_step_ratio=_ratio(_mean_step(runs), _mean_step(base)),
        memory=memory.get(label),
        memory_ratio=_ratio(memory.get(label), memory.get(baseline_label(results))),
        remarks=_remarks(results, task, label),
    )


def _remarks(results: Results, task: str, label: str) -> list[str]:
    remarks = [f"seed {run.seed}: {run.failure}" for run in results.runs_of(task, label) if run.failure is not None]
    remarks += [f"seed {run.seed}: {trouble}" for run in results.runs_of(task, label) if (trouble := _trouble(run))]
    for tuned in results.tuned:
        if (tuned.task, tuned.contender) == (task, label) and tuned.at_edge:
            remarks.append(f"its learning rate {tuned.lr:g} is at the edge of its grid {tuned.grid[0]:g} to {tuned.grid[-1]:g}")
    return remarks


def _trouble(run: Run) -> str:
    """The preconditioner's counters that stay at zero when nothing goes wrong."""
    return ", ".join(f"{name} {count}" for name, count in run.diagnostics.items() if name not in _WORK)


def _complete(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.failure is None]


def _final_loss(run: Run, span: int) -> float:
    return float(trailing_mean(run.losses, span)[-1])


def _seconds(runs: Sequence[Run]) -> list[float]:
    return [seconds for run in runs for seconds in run.seconds]


def _median_step(runs: Sequence[Run]) -> float | None:
    return float(np.median(_seconds(runs))) if _seconds(runs) else None


def _mean_step(runs: Sequence[Run]) -> float | None:
    return _mean(_seconds(runs))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
