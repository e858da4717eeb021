"""The report of a comparison: Markdown to keep, a table on the terminal, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from precond.compare.session import Results
from precond.compare.table import Row, Target, rows

MISSING = "-"

Column = tuple[str, str, Callable[[Row], str]]
"""A heading in full, a heading for the terminal, and the cell of a row."""


def _optional(value: float | None, form: str, scale: float = 1.0) -> str:
    return MISSING if value is None else format(value * scale, form)


def _accuracy(row: Row) -> str:
    mean, spread = _optional(row.accuracy, ".2f", 100), _optional(row.accuracy_spread, ".2f", 100)
    return mean if MISSING in (mean, spread) else f"{mean} ± {spread}"


def _steps(row: Row) -> str:
    some = f" ({row.reached} of {row.seeds})" if 0 < row.reached < row.seeds else ""
    return _optional(row.steps_to_target, ".0f") + some


COLUMNS: list[Column] = [
    ("contender", "contender", lambda row: row.contender),
    ("learning rate", "lr", lambda row: f"{row.lr:g}"),
    ("test accuracy, %", "accuracy %", _accuracy),
    ("final training loss", "loss", lambda row: _optional(row.loss, ".2g")),
    ("steps to target", "steps to it", _steps),
    ("seconds to target", "s to it", lambda row: _optional(row.seconds_to_target, ".2f")),
    ("step time, median, ms", "ms/step", lambda row: _optional(row.median_step, ".2f", 1e3)),
    ("median / SGD's", "median", lambda row: _optional(row.median_step_ratio, ".2f")),
    ("mean / SGD's", "mean", lambda row: _optional(row.mean_step_ratio, ".2f")),
    ("peak memory / SGD's", "memory", lambda row: _optional(row.memory_ratio, ".2f")),
]


def tables(results: Results, target_of: Callable[[str], Target]) -> dict[str, tuple[Target, list[Row]]]:
    """Task name to its target and its rows, for the tasks with at least one finished run."""
    done = [task for task in results.settings["tasks"] if any(run.task == task for run in results.runs)]
    return {task: (target := target_of(task), rows(results, task, target)) for task in done}


def markdown(results: Results, found: dict[str, tuple[Target, list[Row]]], pictures: Sequence[Path] = ()) -> str:
    """The whole report."""
    parts = ["# A comparison under one budget", *_interrupted(results)]
    for task, (target, table) in found.items():
        parts += [f"## {task}", _task_sentence(results, task), f"Target: {target.describe()}.", _markdown_table(table)]
        parts += _remarks(table)
    parts += [f"![{picture.stem.replace('_', ' ')}]({picture.name})" for picture in pictures]
    parts += ["## How it was measured", _method(results)]
    return "\n\n".join(parts) + "\n"


def as_json(results: Results, found: dict[str, tuple[Target, list[Row]]], files: Sequence[Path]) -> str:
    """The tables for a program: what `precond compare --json` prints."""
    answer: dict[str, Any] = {
        "interrupted": results.interrupted,
        "files": [str(path) for path in files],
        "tasks": {task: {"target": asdict(target), "rows": [asdict(row) for row in table]} for task, (target, table) in found.items()},
    }
    return json.dumps(answer, indent=1, allow_nan=False)


def show(found: dict[str, tuple[Target, list[Row]]]) -> None:
    """Print the tables: with rich where it is installed, as Markdown elsewhere."""
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n\n".join(f"{task}\n\n{_markdown_table(table)}" for task, (_, table) in found.items()))
        return
    for task, (target, table) in found.items():
        grid = Table(box=SIMPLE)
        for index, (_, head, _) in enumerate(COLUMNS):
            grid.add_column(head, justify="left" if index == 0 else "right", no_wrap=True)
        for row in table:
            grid.add_row(*(cell(row) for _, _, cell in COLUMNS))
        natural = Console(width=1000).measure(grid).maximum
        console = Console()
        console.width = max(console.width, natural)  # on a narrow terminal the rows wrap: no figure is cut
        console.print(f"{task}; target: {target.describe()}; median, mean and memory are over SGD's", highlight=False)
        console.print(grid)


def _markdown_table(table: Sequence[Row]) -> str:
    heads = [head for head, _, _ in COLUMNS]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([cell(row) for _, _, cell in COLUMNS] for row in table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _task_sentence(results: Results, task: str) -> str:
    budget = results.settings["budgets"][task]
    return f"{results.settings['tasks'][task]}. Budget: {budget['steps']} steps on batches of {budget['batch_size']}."


def _interrupted(results: Results) -> list[str]:
    return ["The comparison was interrupted: what follows is from the runs that were finished."] if results.interrupted else []


def _remarks(table: Sequence[Row]) -> list[str]:
    remarks = [f"- {row.contender}: {remark}." for row in table for remark in row.remarks]
    return ["\n".join(remarks)] if remarks else []


def _method(results: Results) -> str:
    settings = results.settings
    tuning = settings["tuning"]
    rates = (
        "Learning rates are the contenders' own defaults or the ones given."
        if tuning["points"] == 1
        else f"Learning rates were tuned alike: for every contender {tuning['points']} rates half a decade apart around its default "
        f"(one, where the rate was given), each tried on seed 0 for {tuning['fraction']:.0%} of the budget; the one with the lowest "
        "training loss at the end was taken. Test data played no part. No other option was tuned."
    )
    return "\n".join(
        [
            "- Every contender starts from the same parameters and sees the same batches in the same order, for each seed.",
            f"- {rates}",
            f"- Test accuracy is that after the last step: mean ± standard deviation over {settings['seeds']} seed(s).",
            "- Training losses are means over the last epoch's batches; a target is reached when that mean first is.",
            "- Steps and seconds to target are means over the runs that reached it (how many, where not all did). Seconds count forward, "
            "backward and update, not evaluation.",
            "- The mean step time holds the steps that refresh a preconditioner; the median need not.",
            "- Peak memory is the most bytes held by tensors at once, from the making of the model through its first steps, the data set "
            "not counted.",
            f"- Device: {settings['device']}; {settings['machine']}; Python {settings['versions']['python']}, "
            f"torch {settings['versions']['torch']}.",
        ]
    )
