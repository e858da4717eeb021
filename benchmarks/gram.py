"""Time and memory of Gram steps on a large MLP, over a plain training step's.

Run `python benchmarks/gram.py` (--help for the options). What is measured, on an MLP of 20 million parameters at batch 64 by default:

* "step": forward, backward and update with `torch.optim.SGD(lr=0)`;
* "layer_gram", "full_gram": the same step with `empirical_fisher` x the representation x `smw`, observed and refreshed every step;
* time: of interleaved rounds, each step divided by the plain step of its round: the median of the ratios, and the least time over the
  least. By the clock, and by the CPU time of the process, which other work on the machine changes less. The budget is 3;
* memory: the peak bytes of two steps, building the network included, beyond those of plain steps, in vectors of all parameters, the
  direction being one; and the bytes of all that stays held after a step, beside the n P numbers that rows would be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a checkout that is not installed

import precond
from precond.compare.memory import peak_bytes

BUDGET = 3.0
FORMS = ("layer_gram", "full_gram")
Step = Callable[[], None]


def network(widths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def build(widths: Sequence[int], batch: int, form: str | None) -> tuple[Step, precond.Preconditioner | None]:
    """A training step, and what it is preconditioned by."""
    torch.manual_seed(0)
    model, criterion = network(widths), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    made = None
    if form is not None:
        made = precond.Preconditioner(matrix="empirical_fisher", repr=form, solver="smw", damping=1e-2, seed=0)
        made.attach(model, criterion, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step, made


def held(preconditioner: precond.Preconditioner) -> int:
    """Bytes that live on after a step, each storage once."""
    storages = {}
    for entry in preconditioner.state_dict()["blocks"].values():
        pending = [entry["statistics"], entry["state"]]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, torch.Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def timed(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """By name and round: seconds by the clock, and of the CPU."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start, busy = time.perf_counter(), time.process_time()
            step()
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - start, time.process_time() - busy))
    return times


def ratios(times: list[float], plain: list[float]) -> tuple[float, float]:
    """The median of the ratios by round, and the ratio of the least times."""
    return statistics.median(t / p for t, p in zip(times, plain, strict=True)), min(times) / min(plain)


def two_steps(widths: Sequence[int], batch: int, form: str | None) -> None:
    step, _ = build(widths, batch, form)
    step()
    step()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    count = sum(i * o + o for i, o in itertools.pairwise(options.widths))
    contenders = {form or "step": build(options.widths, options.batch, form) for form in (None, *FORMS)}
    times = timed({name: step for name, (step, _) in contenders.items()}, options.rounds)
    clock, cpu = ({name: [t[i] for t in found] for name, found in times.items()} for i in range(2))
    peaks = {
        form: peak_bytes(partial(two_steps, options.widths, options.batch, form), torch.device("cpu")) for form in (None, *FORMS)
    }
    rows = []
    for form in FORMS:
        preconditioner = contenders[form][1]
        assert preconditioner is not None
        rows.append(
            {
                "form": form, "time": ratios(clock[form], clock["step"]), "cpu": ratios(cpu[form], cpu["step"]),
                "extra_vectors": (peaks[form] - peaks[None]) / (4 * count), "held_bytes": held(preconditioner),
                "rows_bytes": 4 * options.batch * count,
            }
        )  # fmt: skip
    return {
        "parameters": count, "batch": options.batch, "threads": options.threads, "rounds": options.rounds,
        "plain_seconds": statistics.median(clock["step"]), "torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count(),
        "load": os.getloadavg()[0], "budget": BUDGET, "rows": rows,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| representation | time / step, median | least / least | CPU time / step, median | least / least | peak, vectors | held MB | rows MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['form']} | {r['time'][0]:.2f} | {r['time'][1]:.2f} | {r['cpu'][0]:.2f} | {r['cpu'][1]:.2f} | {r['extra_vectors']:.2f} | "
        f"{r['held_bytes'] / 1e6:.1f} | {r['rows_bytes'] / 1e6:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 2560, 2560, 2560, 1860, 10])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures and write nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "gram.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return 0
    head = (
        f"{result['parameters']:,} parameters, batch {options.batch}, {options.rounds} rounds; {result['machine']} CPU, {options.threads} threads, "
        f"torch {result['torch']}; plain step {1e3 * result['plain_seconds']:.0f} ms, load {result['load']:.1f} on {result['cpus']} processors"
    )
    text = table(result["rows"])
    over = [r["form"] for r in result["rows"] if r["time"][0] > BUDGET]
    read = f"The budget is {BUDGET:g} plain steps: " + (f"{' and '.join(over)} exceeded it." if over else "both are within it.")
    print(head, text, read, sep="\n\n")
    command = " ".join(["python benchmarks/gram.py", *sys.argv[1:]])
    options.out.write_text(
        "# Steps by Gram matrices on a large MLP, over plain training steps\n\nWritten by `benchmarks/gram.py`, whose head says what is measured."
        f"\n\n```\n{command}\n```\n\n{head}\n\n{text}\n\n{read}\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
