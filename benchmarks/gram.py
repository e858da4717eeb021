"""Time and memory of Gram steps on a large MLP, over a plain training step's.

Run `python benchmarks/gram.py` (--help for the options). What is measured, on an MLP of 20 million parameters at batch 64 by default:

* "step": forward, backward and update with `torch.optim.SGD(lr=0)`;
* "layer_gram", "full_gram": the same step with `empirical_fisher` x the representation x `smw`, observed and refreshed every step;
* time: the median over interleaved rounds, divided by that of the plain step. The budget is 3;
* memory: the peak bytes of two steps, building the network included, beyond those of plain steps, in vectors of all parameters, the
  direction being one; and the bytes of all that stays held after a step, beside the n P numbers that rows would be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a checkout that is not installed

import itertools

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 2560, 2560, 2560, 1860, 10])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = sum(i * o + o for i, o in zip(options.widths, options.widths[1:], strict=False))

    contenders = {form or "step": build(options.widths, options.batch, form) for form in (None, *FORMS)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds + 1):
        for name, (step, _) in contenders.items():
            start = time.perf_counter()
            step()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    plain = statistics.median(times["step"])

    def two_steps(form: str | None) -> None:
        step, _ = build(options.widths, options.batch, form)
        step(), step()

    peaks = {name: peak_bytes(lambda name=name: two_steps(None if name == "step" else name), torch.device("cpu")) for name in contenders}
    rows = []
    for form in FORMS:
        preconditioner = contenders[form][1]
        assert preconditioner is not None
        rows.append(
            {
                "form": form, "time": statistics.median(times[form]) / plain, "extra_vectors": (peaks[form] - peaks["step"]) / (4 * count),
                "held_bytes": held(preconditioner), "rows_bytes": 4 * options.batch * count,
            }
        )  # fmt: skip
    result = {
        "parameters": count, "batch": options.batch, "threads": options.threads, "plain_seconds": plain, "torch": torch.__version__,
        "machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0], "budget": BUDGET, "rows": rows,
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return 0
    print(
        f"{count:,} parameters, batch {options.batch}, {options.threads} threads, plain step {1e3 * plain:.0f} ms, load {result['load']:.1f}"
    )
    print(f"{'':12} {'time / step':>12} {'peak, vectors':>14} {'held, MB':>10} {'rows, MB':>10}")
    for row in rows:
        print(
            f"{row['form']:12} {row['time']:>12.2f} {row['extra_vectors']:>14.2f} {row['held_bytes'] / 1e6:>10.1f} {row['rows_bytes'] / 1e6:>10.0f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
