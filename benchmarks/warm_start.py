"""Warm-started QR and Newton iterations beside a fresh eigendecomposition of a matrix that moves by 1 % a refresh.

Run `python benchmarks/warm_start.py` (--help for the options). What is measured:

* the matrix is an average of gradients' outer products with a decaying spectrum, C <- 0.99 C + 0.01 C' with C' a fresh one of the same
  size, damped by a fraction of its largest eigenvalue at the start;
* a round is one move and one refresh by every contender in turn; each carries its own state, so that what it puts off it pays for later.
  A refresh does not change the state it starts from, so each is timed a few times, all contenders in turn, and the shortest is kept: other
  load on the machine only lengthens. "ms a refresh" is the mean over the rounds of these, with the rare round in which a basis has to move,
  "longest" that round. One thread on a CPU is timed by its own processor time, any other by the clock;
* what is put off to the application: "ms an application", the shortest of all, to one vector;
* error: of (C + damping I)^(-power) applied to one random vector, relative to float64 `eigh`; the mean over the rounds.

"times faster" is relative to `torch.linalg.eigh` alone, the fastest that a fresh eigendecomposition can be, timed among the rest; `eigen` is the
library's solver on top of it. "no less accurate" compares with the error of `eigen`, in the same dtype. For power 1 a Cholesky
factorisation stands beside them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a checkout that is not installed

from precond.damping import Tikhonov
from precond.operators import Dense
from precond.solvers import Cholesky, Eigen, NewtonSchulz, QRIteration, Solver

EIGH = "torch.linalg.eigh"


def moment(n: int, generator: torch.Generator, dtype: torch.dtype, basis: Tensor) -> Tensor:
    """(1 / 4n) X^T X of 4 n rows with standard deviations 1 / i in a fixed basis."""
    rows = torch.randn(4 * n, n, generator=generator, dtype=dtype) / torch.arange(1, n + 1, dtype=dtype)
    rows = rows @ basis
    return rows.T @ rows / len(rows)


def contenders(power: float, tolerances: list[float]) -> dict[str, Solver]:
    found: dict[str, Solver] = {"eigen": Eigen(power=power)}
    found |= {f"qr_iteration, tolerance {t:g}": QRIteration(power=power, tolerance=t, steps=3) for t in tolerances}
    if power == 1:
        found |= {f"newton_schulz, tolerance {t:g}": NewtonSchulz(tolerance=t) for t in tolerances}
        found["cholesky"] = Cholesky()
    return found


def measure(power: float, damped: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    n, dtype, device = options.dimension, getattr(torch, options.dtype), options.device
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=dtype)).Q
    C = moment(n, generator, dtype, basis)
    damping, v = Tikhonov(damped * float(torch.linalg.matrix_norm(C, 2))), torch.randn(n, generator=generator, dtype=dtype)
    solvers = contenders(power, options.tolerances)
    states = {name: solver.init(Dense(C.to(device)), damping) for name, solver in solvers.items()}
    times: dict[str, list[float]] = {name: [] for name in (EIGH, *solvers)}
    applied: dict[str, list[float]] = {name: [] for name in solvers}
    errors: dict[str, list[float]] = {name: [] for name in solvers}
    clock = partial(seconds, device=device, own=device == "cpu" and options.threads == 1)
    for _ in range(options.rounds):
        C = 0.99 * C + 0.01 * moment(n, generator, dtype, basis)
        operator = Dense(C.to(device))
        d, U = torch.linalg.eigh(C.double())
        exact = (U * (d + damping.value) ** -power) @ (U.T @ v.double())
        new: dict[str, Any] = {}
        taken: dict[str, list[float]] = {name: [] for name in times}
        for _ in range(options.repeats):
            taken[EIGH].append(clock(lambda: torch.linalg.eigh(operator.matrix))[0])  # noqa: B023  # called at once
            for name, solver in solvers.items():
                took, new[name] = clock(lambda: solver.refresh(states[name], operator, damping))  # noqa: B023
                taken[name].append(took)
                applied[name].append(clock(lambda: solver.apply(new[name], v.to(device)))[0])  # noqa: B023
        states = new
        for name, each in taken.items():
            times[name].append(min(each))
        for name, solver in solvers.items():
            found = solver.apply(states[name], v.to(device))[0].cpu().double()
            errors[name].append(float((found - exact).norm() / exact.norm()))
    base, allowed = statistics.mean(times[EIGH]), statistics.mean(errors["eigen"])
    rows = [{"solver": EIGH, "ms": 1e3 * base, "longest": 1e3 * max(times[EIGH]), "faster": 1.0}]
    for name in solvers:
        mean, error = statistics.mean(times[name]), statistics.mean(errors[name])
        row = {"ms": 1e3 * mean, "longest": 1e3 * max(times[name]), "faster": base / mean, "error": error, "equal": error <= allowed}
        rows.append({"solver": name, "applied": 1e3 * min(applied[name])} | row)
    return [{"power": power, "damping": damped} | row for row in rows]


def seconds(work: Callable[[], Any], device: str, own: bool) -> tuple[float, Any]:
    """How long it took, and the result; own: processor time of this process, which does not count what else the machine does."""
    now = time.process_time if own else time.perf_counter
    synchronise(device)
    start = now()
    result = work()
    synchronise(device)
    return now() - start, result


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| power | damping | solver | ms a refresh | longest | times faster than eigh | error | no less accurate than eigen | ms an application |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        accuracy = f"{r['error']:.1e} | {'yes' if r['equal'] else 'no'} | {r['applied']:.2f}" if "error" in r else "| |"
        lines.append(f"| {r['power']:g} | {r['damping']:g} | {r['solver']} | {r['ms']:.1f} | {r['longest']:.1f} | {r['faster']:.1f} | {accuracy} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Of each warm-started solver, the fastest setting that is no less accurate than `eigen`."""
    lines = []
    for power, damped in dict.fromkeys((r["power"], r["damping"]) for r in rows):
        here = [r for r in rows if (r["power"], r["damping"]) == (power, damped)]
        (eigen,) = (r for r in here if r["solver"] == "eigen")
        for kind in ("qr_iteration", "newton_schulz"):
            mine = [r for r in here if r["solver"].startswith(kind)]
            equal = sorted((r for r in mine if r["equal"]), key=lambda r: r["ms"])
            if mine and not equal:
                lines.append(f"- power {power:g}, damping {damped:g}: no setting of {kind} is as accurate as eigen.")
            elif equal:
                best = equal[0]
                lines.append(
                    f"- power {power:g}, damping {damped:g}: {best['solver']}: {best['faster']:.1f} times faster than eigh, "
                    f"{eigen['ms'] / best['ms']:.1f} than eigen, error {best['error']:.1e} beside {eigen['error']:.1e}."
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-2, 1e-4, 1e-5])
    parser.add_argument("--dampings", type=float, nargs="+", default=[1e-2, 1e-4], help="in units of the largest eigenvalue")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "warm_start.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [r for p in (1.0, 0.5) for damped in options.dampings for r in measure(p, damped, options)]
    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.machine()} CPU, {options.threads} threads"
    head = (
        f"{options.dimension} x {options.dimension}, {options.dtype}, {options.rounds} rounds, the shortest of {options.repeats} each; {name}, "
        f"torch {torch.__version__}"
    )
    text = f"{head}\n\nThe fastest setting that is no less accurate than eigen:\n\n{summary(rows)}\n\n{table(rows)}"
    print(text)
    command = " ".join(["python benchmarks/warm_start.py", *sys.argv[1:]])
    options.out.write_text(
        "# Warm-started QR and Newton iterations beside a fresh eigendecomposition\n\nWritten by `benchmarks/warm_start.py`, whose head says "
        f"what is measured.\n\n```\n{command}\n```\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
