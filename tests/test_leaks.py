"""Claim: nothing leaks. After 200 steps as many tensors are alive as after 20, with every matrix, the garbage collector off.

The negative control keeps one tensor a step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nets
import precond
from pairs import valid
from precond import cells, matrices, representations, solvers
from precond.matrices import BFGSHessian

WARM, STEPS = 20, 200
CELLS: list[tuple[Any, str, str]] = []
for name in matrices.names():
    matrix = matrices.get(name)()
    kind = next(r for r in ("kron_io", "layer", *representations.names()) if valid(name, r))
    solver = next(s for s in ("cholesky", "lu", "cg") if cells.why_not(matrix, representations.get(kind)(), solvers.get(s)()) is None)
    CELLS.append((name, kind, solver))
CELLS += [("ggn", "matrix_free", "cg"), ("empirical_fisher", "layer", "cholesky")]
CELLS += [(BFGSHessian(pairs=pairs), "full", "bfgs") for pairs in ("replay", "products", "gradients")]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """What is there already is looked at no more, by the collector neither."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> int:
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def growth(step: Any) -> int:
    """Tensors alive after 200 steps beyond those after 20; what only a collection would free counts as alive."""
    for _ in range(WARM):
        step()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(STEPS - WARM):
            step()
        return alive() - before
    finally:
        gc.enable()


@pytest.mark.parametrize(("matrix", "repr", "solver"), CELLS, ids=str)
def test_as_many_tensors_are_alive_after_200_steps_as_after_20(matrix: Any, repr: str, solver: str) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    preconditioner = precond.Preconditioner(matrix=matrix, repr=repr, solver=solver, damping=1.0)
    preconditioner.attach(model, criterion, optimizer)
    x, y = nets.normal(4, 3, seed=1).float(), nets.labels(2, 4)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        criterion(model(x), y)  # a forward pass that is never differentiated
        optimizer.step()

    assert growth(step) == 0
    assert preconditioner.diagnostics["observations"] == STEPS


def test_a_leak_is_seen() -> None:
    kept: list[Tensor] = []
    assert growth(lambda: kept.append(torch.zeros(1))) == STEPS - WARM
