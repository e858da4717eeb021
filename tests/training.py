"""Tiny training runs in float64, ours and dense ones, for the tests of rules, loops, state and failures.

What this file claims, and the tests rely on:

* everything is seeded: two runs with the same arguments are the same run, and the global random state is left as it was on building;
* `fit_dense` uses nothing of `precond`: each step solves (C + damping I) d = g with C from the dense oracle `dense.py`;
* `KINDS` holds one preconditioner for every kind of observation: columns of a nested pass, columns of the user's own backward pass, the
  gradient of the step, and products by replay; all of them are exact functions of the batch, so that a loop that computes the same
  loss in another way must give the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import precond
from nets import labels, normal, seeded
from precond import Preconditioner

LR = 0.1
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
Batch = tuple[Tensor, Tensor]
Loop = Callable[[nn.Module, nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]
Make = Callable[[], Preconditioner]


def net() -> nn.Module:
    """4 - 5 - 3, tanh, 43 parameters."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def batches(steps: int = 3, size: int = 6) -> list[Batch]:
    return [(normal(size, 4, seed=10 + k), labels(3, size, seed=50 + k)) for k in range(steps)]


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def sgd(model: nn.Module, lr: float = LR) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def make(matrix: Any = "ggn", repr: Any = "full", solver: Any = "cholesky", damping: Any = 0.1, **options: Any) -> Preconditioner:
    return Preconditioner(matrix=matrix, repr=repr, solver=solver, damping=damping, **{"seed": 0, **options})


KINDS: dict[str, Make] = {
    "ggn_full": make,
    "ef_full": lambda: make("empirical_fisher"),
    "kfac": lambda: make(repr="kron_io", damping=1e-2, history=0.9),
    "ef_kron": lambda: make("empirical_fisher", "kron_io", "eigen", 1e-2, history=0.9),
    "shampoo": lambda: make("batched_empirical_fisher", "kron_dim", precond.solvers.Eigen(power=0.5), 0.0, history=precond.history.Sum(1e-2)),
    "hessian_free": lambda: make(repr="matrix_free", solver="cg"),
    "newton": lambda: make("hessian", "full", "lu", 2.0),
    "adam": lambda: precond.recipe("adam", seed=0),
}


def plain(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """The loop everybody writes."""
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def accumulate(*sizes: int) -> Loop:
    """Micro-batches of these sizes, each weighted by its share of the batch."""

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for xi, yi in zip(x.split(sizes), y.split(sizes), strict=True):
            (criterion(model(xi), yi) * (len(xi) / len(x))).backward()
        optimizer.step()

    return loop


def fit(
    preconditioner: Preconditioner | None, loop: Loop = plain, *, steps: int = 3, build: Callable[[], nn.Module] = net,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd, data: list[Batch] | None = None, criterion: nn.Module | None = None,
    scaler: Any = None,
) -> nn.Module:  # fmt: skip
    """Train a fresh network; returns it, with the preconditioner still attached."""
    model, criterion = build(), criterion or nn.CrossEntropyLoss()
    outer = optimizer(model)
    if preconditioner is not None:
        preconditioner.attach(model, criterion, outer, scaler=scaler)
    for x, y in data or batches(steps):
        loop(model, criterion, outer, x, y)
    return model


Curvature = Callable[[nn.Module, Tensor, Tensor], Tensor]


def of(matrix: str, criterion: nn.Module | None = None) -> Curvature:
    """The oracle's matrix of a batch."""
    criterion = criterion or nn.CrossEntropyLoss()
    return lambda model, x, y: getattr(dense, matrix)(model, criterion, x, y)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return dense.gradient(model, nn.CrossEntropyLoss(), x, y)


def fit_dense(
    curvature: Curvature, damping: float = 0.1, *, slope: Curvature = gradient, steps: int = 3, build: Callable[[], nn.Module] = net,
    data: list[Batch] | None = None,
) -> nn.Module:  # fmt: skip
    """The same training by dense linear algebra: theta <- theta - LR (C + damping I)^-1 g."""
    model = build()
    for x, y in data or batches(steps):
        C, g = curvature(model, x, y), slope(model, x, y)
        move(model, -LR * solve(C, damping, g))
    return model


def solve(C: Tensor, damping: float, g: Tensor) -> Tensor:
    """(C + damping I)^-1 g."""
    return torch.linalg.solve(C + damping * torch.eye(len(C), dtype=C.dtype), g)


def move(model: nn.Module, step: Tensor) -> None:
    """Add a flat vector to the trainable parameters."""
    with torch.no_grad():
        for p, change in zip(dense.parameters(model), step.split([p.numel() for p in dense.parameters(model)]), strict=True):
            p += change.view_as(p)


def same(ours: nn.Module, other: nn.Module) -> None:
    assert_close(theta(ours), theta(other), **EXACT)


def differ(ours: Tensor | nn.Module, other: Tensor | nn.Module, by: float = 1e-6) -> None:
    """A negative control: what must be seen is seen."""
    a, b = (theta(t) if isinstance(t, nn.Module) else t for t in (ours, other))
    assert (a - b).norm() > by * b.norm()


def matrix_of(preconditioner: Preconditioner, name: str = "model") -> Tensor:
    """The dense matrix of a block's present operator."""
    return preconditioner.operators[name].to_dense()
