"""Claims about what a solver carries from step to step (the iterate of `heavy_ball`, the warm starts of `cg` and `neumann`) and a step that is not made:

- a direction that is not finite leaves it as it was before, or zero where there was none: the next steps are those of a run that never saw it;
- pairs of a first observation that is not finite are not kept, so that the second one is as a first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from precond.solvers import CG, HeavyBall, Neumann
from test_failure import clean
from training import EXACT, batches, make, net, plain, sgd, theta

CARRIED: dict[str, Any] = {"heavy_ball": HeavyBall(), "cg": CG(warm_start=0.9, max_iterations=3), "neumann": Neumann(warm_start=0.9, terms=3)}


def run(solver: Any, bad: int | None, value: float, repr: str = "layer") -> Any:
    """Six steps, of which one has a bad gradient, or is not made."""
    model, criterion = net(), nn.CrossEntropyLoss()
    preconditioner = make("ggn", repr, solver, 1.0, history="local").attach(model, criterion, optimizer := sgd(model))
    for step, (x, y) in enumerate(batches(6)):
        if step != bad:
            plain(model, criterion, optimizer, x, y)
            continue
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        for p in model.parameters():
            p.grad.fill_(value)
        optimizer.step()
        assert clean(preconditioner, model)
        assert preconditioner.diagnostics["directions_zeroed"] + preconditioner.diagnostics["solves_failed"] > 0
    return theta(model)


@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200], ids=str)
@pytest.mark.parametrize("name", CARRIED)
def test_a_bad_direction_leaves_it_as_it_was(name: str, value: float, bad: int) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    preconditioner = make("ggn", "layer", CARRIED[name], 1.0).attach(model, criterion, optimizer := sgd(model))
    for step, (x, y) in enumerate(batches(6)):
        if step != bad:  # never sees it
            plain(model, criterion, optimizer, x, y)
    assert_close(run(CARRIED[name], bad, value), theta(model), **EXACT)
    assert preconditioner.diagnostics["steps"] == 5


@pytest.mark.parametrize("name", CARRIED)
def test_it_is_carried_where_all_is_well(name: str) -> None:
    """Control: from step to step it matters."""
    fresh = {"heavy_ball": CG(max_iterations=1), "cg": CG(max_iterations=3), "neumann": Neumann(terms=3)}[name]
    assert (run(CARRIED[name], None, 0.0) - run(fresh, None, 0.0)).norm() > 1e-4


@pytest.mark.parametrize(
    ("matrix", "repr", "solver"), [("ggn", "layer", "psgd"), ("batched_empirical_fisher", "diagonal", "psgd"), ("bfgs_hessian", "full", "bfgs")]
)
def test_pairs_of_a_bad_first_observation_are_not_kept(matrix: str, repr: str, solver: str) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    preconditioner = make(matrix, repr, solver, 1.0).attach(model, criterion, optimizer := sgd(model, lr=0.01))
    (x, y), *rest = batches(4)
    optimizer.zero_grad()
    (criterion(model(x), y) * float("nan")).backward()
    optimizer.step()
    assert clean(preconditioner, model) and preconditioner.diagnostics["blocks_kept"] == 0
    for x, y in rest:
        before = theta(model)
        plain(model, criterion, optimizer, x, y)
        assert clean(preconditioner, model) and not torch.equal(theta(model), before)
