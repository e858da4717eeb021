"""`precond compare`: its arguments, and what it writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from precond.compare import plots, report, tasks
from precond.compare.contenders import parse_all
from precond.compare.extras import need
from precond.compare.progress import choose
from precond.compare.run import Budget
from precond.compare.session import Plan, Results, compare
from precond.compare.table import Target, baseline_target
from precond.compare.tune import Tuning
from precond.errors import UsageError

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def execute(arguments: argparse.Namespace) -> int:
    """Run the comparison that the command line asks for; returns the exit code."""
    plan = _plan(arguments)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.pictures:
        need("matplotlib", package="matplotlib", purpose="to draw the pictures (--no-pictures does without)")
    results = compare(plan, out, choose())
    if results.interrupted:
        print(f"interrupted: the report is made from the {len(results.runs)} finished runs", file=sys.stderr)
    _report(arguments, results, out)
    return INTERRUPTED if results.interrupted else 0


def _plan(arguments: argparse.Namespace) -> Plan:
    """Everything is checked here, before the first training step."""
    contenders = parse_all(arguments.contenders or ["sgd,adamw,kfac,shampoo"])
    chosen = [tasks.get(name) for name in dict.fromkeys(arguments.task or ["digits_mlp"])]
    if arguments.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, not {arguments.seeds}.")
    return Plan(
        tasks=chosen,
        contenders=contenders,
        seeds=arguments.seeds,
        budgets={task.name: _budget(arguments, task) for task in chosen},
        tuning=Tuning(points=arguments.grid, fraction=arguments.tuning_fraction),
        device=_device(arguments.device),
    )


def _budget(arguments: argparse.Namespace, task: tasks.Task) -> Budget:
    if arguments.steps is not None:
        return Budget(steps=arguments.steps, batch_size=arguments.batch_size)
    if arguments.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {arguments.batch_size}.")
    return Budget.of_epochs(arguments.epochs, arguments.batch_size, task)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device; write cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"a comparison runs on cpu or cuda, not on {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here; leave --device out to train on the CPU.")
    return device


def _report(arguments: argparse.Namespace, results: Results, out: Path) -> None:
    def target_of(task: str) -> Target:
        if arguments.target_accuracy is not None:
            return Target(accuracy=arguments.target_accuracy, origin="as asked for")
        if arguments.target_loss is not None:
            return Target(loss=arguments.target_loss, origin="as asked for")
        return baseline_target(results, task)

    files = [out / "results.json"]
    found = report.tables(results, target_of)
    if found:
        pictures = plots.draw(results, out) if arguments.pictures else []
        text = out / "report.md"
        text.write_text(report.markdown(results, found, pictures))
        files += [text, *pictures]
    if arguments.json:
        print(report.as_json(results, found, files))
        return
    report.show(found)
    for path in files:
        print(f"wrote {path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `precond compare`."""
    add = parser.add_argument
    add("--task", action="append", metavar="NAME", help=f"one of {', '.join(tasks.names())}; may be repeated (default: digits_mlp)")
    add(
        "--contenders",
        action="append",
        metavar="LIST",
        help="sgd, adamw and names of recipes, separated by commas, each with options if need be: "
        "kfac:lr=0.03,damping=1e-2,shampoo (default: sgd,adamw,kfac,shampoo; sgd always runs, ratios are over it)",
    )
    add("--seeds", type=int, default=3, metavar="N", help="runs of each contender (default: %(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=int, default=10, metavar="N", help="the budget in passes over the data (default: %(default)s)")
    budget.add_argument("--steps", type=int, metavar="N", help="the budget in steps")
    add("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    add("--grid", type=int, default=5, metavar="N", help="learning rates tried for each contender; 1: none (default: %(default)s)")
    add("--tuning-fraction", type=float, default=1.0, metavar="F", help="length of a tuning run over the budget (default: 1)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--target-loss", type=float, metavar="L", help="time to this training loss (default: the one SGD ends at)")
    target.add_argument("--target-accuracy", type=float, metavar="A", help="time to this test accuracy, in (0, 1)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--out", default="comparison", metavar="DIR", help="folder of the report (default: %(default)s)")
    add("--no-pictures", dest="pictures", action="store_false", help="draw nothing; matplotlib is then not needed")
    add("--json", action="store_true", help="print the tables as JSON")
