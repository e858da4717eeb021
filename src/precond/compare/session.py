"""A whole comparison: tune, train and measure every contender on every task, keeping what is finished."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from precond.compare.contenders import Contender
from precond.compare.progress import Display, Silent
from precond.compare.run import Budget, Run, peak_memory, train
from precond.compare.tasks import Task
from precond.compare.tune import Tuned, Tuning, tune


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be compared, and the one budget of each task."""

    tasks: Sequence[Task]
    contenders: Sequence[Contender]
    seeds: int
    budgets: dict[str, Budget]
    tuning: Tuning = field(default_factory=Tuning)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def steps(self) -> int:
        """Training steps of the whole comparison, tuning runs included."""
        return sum(self._steps(task, contender) for task in self.tasks for contender in self.contenders)

    def _steps(self, task: Task, contender: Contender) -> int:
        budget, grid = self.budgets[task.name], self.tuning.grid(contender)
        return self.seeds * budget.steps + (len(grid) * self.tuning.budget(budget).steps if len(grid) > 1 else 0)


@dataclass(kw_only=True)
class Results:
    """Everything a comparison found; `results.json` holds exactly this."""

    settings: dict[str, Any]
    tuned: list[Tuned] = field(default_factory=list)
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False

    def runs_of(self, task: str, contender: str) -> list[Run]:
        """The finished runs of one contender on one task."""
        return [run for run in self.runs if (run.task, run.contender) == (task, contender)]

    def save(self, path: Path) -> None:
        """Write the results as JSON; a reader never sees half a file."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)


def compare(plan: Plan, out: Path, display: Display | None = None) -> Results:
    """Carry out `plan`, writing `out/results.json` after every run.

    Contenders take turns within a seed, so that a machine that slows down slows them alike. Ctrl-C
    ends the comparison early: what is finished is returned, marked `interrupted`.
    """
    display = display or Silent()
    results = Results(settings=settings(plan))
    path = out / "results.json"
    with display:
        display.start(plan.steps())
        try:
            for _ in _advance(plan, results, display):
                results.save(path)
        except KeyboardInterrupt:
            results.interrupted = True
        results.save(path)
    return results


def _advance(plan: Plan, results: Results, display: Display) -> Iterator[None]:
    """Do one piece of work at a time, each of them added to `results` when it is complete."""
    for task in plan.tasks:
        budget, rates = plan.budgets[task.name], dict[str, float]()
        for contender in plan.contenders:
            display.begin(f"{task.name}: {contender.label}, learning rate")
            tuned = tune(task, contender, tuning=plan.tuning, budget=budget, device=plan.device, on_step=display.advance)
            rates[contender.label] = tuned.lr
            results.tuned.append(tuned)
            peak = peak_memory(task, contender, lr=tuned.lr, batch_size=budget.batch_size, device=plan.device)
            results.memory.setdefault(task.name, {})[contender.label] = peak
            yield
        for seed in range(plan.seeds):
            for contender in plan.contenders:
                display.begin(f"{task.name}: {contender.label}, seed {seed}")
                lr = rates[contender.label]
                run = train(task, contender, lr=lr, seed=seed, budget=budget, device=plan.device, on_step=display.advance)
                results.runs.append(run)
                display.finished(run)
                yield


def settings(plan: Plan) -> dict[str, Any]:
    """What a reader needs to judge the figures: the plan and the machine."""
    on_gpu = plan.device.type == "cuda"
    return {
        "tasks": {task.name: task.summary for task in plan.tasks},
        "train_examples": {task.name: len(task.train_inputs) for task in plan.tasks},
        "contenders": [contender.label for contender in plan.contenders],
        "seeds": plan.seeds,
        "budgets": {name: asdict(budget) for name, budget in plan.budgets.items()},
        "tuning": asdict(plan.tuning),
        "device": torch.cuda.get_device_name(plan.device) if on_gpu else "cpu",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
