"""Warm-started QR and Newton iterations beside a fresh eigendecomposition of a matrix that moves by 1 % a refresh.

Run `python benchmarks/warm_start.py` (--help for the options). What is measured:

* the matrix is an average of gradients' outer products with a decaying spectrum, C <- 0.99 C + 0.01 C' with C' a fresh one of the same
  size, damped by 0.01 of its largest eigenvalue;
* a round is one move and one refresh by every contender in turn; each carries its own state. Time: the median over the rounds;
* error: of (C + damping I)^(-power) applied to one random vector, relative to float64 `eigh`; the mean over the rounds. A warm start
  stops at the tolerance asked (largest entry of C X - I for Newton, what is off the diagonal of Q^T C Q for QR), an eigendecomposition
  always goes to rounding: the table shows what each tolerance buys, down to the accuracy of `eigen`.

`eigen` is the library's own solver: `torch.linalg.eigh` and the rotation to and fro. For power 1 a Cholesky factorisation stands beside it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a checkout that is not installed

from precond.damping import Tikhonov
from precond.operators import Dense
from precond.solvers import Cholesky, Eigen, NewtonSchulz, QRIteration, Solver


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


def measure(n: int, power: float, rounds: int, tolerances: list[float], dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=dtype)).Q
    C = moment(n, generator, dtype, basis)
    damping, v = Tikhonov(0.01 * float(torch.linalg.matrix_norm(C, 2))), torch.randn(n, generator=generator, dtype=dtype)
    solvers = contenders(power, tolerances)
    states = {name: solver.init(Dense(C.to(device)), damping) for name, solver in solvers.items()}
    times: dict[str, list[float]] = {name: [] for name in solvers}
    errors: dict[str, list[float]] = {name: [] for name in solvers}
    for _ in range(rounds):
        C = 0.99 * C + 0.01 * moment(n, generator, dtype, basis)
        operator = Dense(C.to(device))
        d, U = torch.linalg.eigh(C.double())
        exact = (U * (d + damping.value) ** -power) @ (U.T @ v.double())
        for name, solver in solvers.items():
            synchronise(device)
            start = time.perf_counter()
            states[name] = solver.refresh(states[name], operator, damping)
            synchronise(device)
            times[name].append(time.perf_counter() - start)
            found = solver.apply(states[name], v.to(device))[0].cpu().double()
            errors[name].append(float((found - exact).norm() / exact.norm()))
    base = statistics.median(times["eigen"])
    return [
        {"power": power, "solver": name, "ms": 1e3 * statistics.median(t), "faster": base / statistics.median(t), "error": statistics.mean(errors[name])}
        for name, t in times.items()
    ]  # fmt: skip


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| power | solver | ms a refresh | times faster than eigen | error |", "|---|---|---|---|---|"]
    lines += [f"| {r['power']:g} | {r['solver']} | {r['ms']:.1f} | {r['faster']:.1f} | {r['error']:.1e} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "warm_start.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = [r for p in (1.0, 0.5) for r in measure(options.dimension, p, options.rounds, options.tolerances, dtype, options.device)]
    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.machine()} CPU, {options.threads} threads"
    head = f"{options.dimension} x {options.dimension}, {options.dtype}, {options.rounds} rounds; {name}, torch {torch.__version__}"
    text = table(rows)
    print(head, text, sep="\n\n")
    command = " ".join(["python benchmarks/warm_start.py", *sys.argv[1:]])
    options.out.write_text(
        "# Warm-started QR and Newton iterations beside a fresh eigendecomposition\n\nWritten by `benchmarks/warm_start.py`, whose head says "
        f"what is measured.\n\n```\n{command}\n```\n\n{head}\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
