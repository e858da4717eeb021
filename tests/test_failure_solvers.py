"""Claims about refreshes that fail, for every solver of the registry, injected through a preconditioner in training in float32:

- a refresh that fails once is solved in float64, one that fails two to four times with more damping, one that always fails keeps the last good state; each
  way of failing (`SolverFailure`, an error of torch's linear algebra, a state that is not finite) climbs alike, and is counted for each block;
- a matrix-free operator cannot be cast: its first failure raises the damping;
- no parameter and no state is ever not finite, and the steps after it are steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import precond
from precond import Preconditioner, SolverFailure, solvers
from precond.solvers import Solver
from test_failure import clean
from training import batches, make, net, plain, sgd, theta

CELLS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("cholesky", "lu", "eigen", "qr_iteration", "newton_schulz", "riemannian"), ("ggn", "kron_io")),
    **dict.fromkeys(("cg", "krylov", "neumann", "heavy_ball"), ("ggn", "layer")),
    "smw": ("ggn", "layer_low_rank"), "elementwise": ("ggn", "diagonal"), "sparse_cholesky": ("ggn", "layer_sparse"), "psgd": ("ggn", "layer"),
    "bfgs": ("ggn", "layer"),
}  # fmt: skip
RUNGS = ("retries_float64", "retries_damping", "retries_cpu", "blocks_kept")


def raises() -> Any:
    raise SolverFailure("injected")


def breaks() -> Any:
    raise torch.linalg.LinAlgError("linalg.injected: the algorithm failed to converge")


def is_not_finite() -> Any:
    return {"factor": torch.full((2, 2), float("nan"))}


def flaky(monkeypatch: pytest.MonkeyPatch, solver: type[Solver], failures: int, how: Callable[[], Any]) -> None:
    """Each refresh of a block fails so often before it is tried."""
    made, left = solver.refresh, [failures]

    def refresh(self: Solver, state: Any, operator: Any, damping: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            return how()
        left[0] = failures
        return made(self, state, operator, damping)

    monkeypatch.setattr(solver, "refresh", refresh)


def train(preconditioner: Preconditioner, monkeypatch: pytest.MonkeyPatch, failures: int, how: Callable[[], Any]) -> tuple[dict[str, int], int]:
    """Three steps, of which the second one's refreshes fail; what it counted, and the number of blocks."""
    model, criterion = net().float(), nn.CrossEntropyLoss()
    preconditioner.attach(model, criterion, optimizer := sgd(model, lr=0.01))
    data = [(x.float(), y) for x, y in batches(3)]
    plain(model, criterion, optimizer, *data[0])
    before, counted = theta(model), dict(preconditioner.diagnostics)
    with monkeypatch.context() as patched:
        flaky(patched, type(preconditioner.triple.solver), failures, how)
        plain(model, criterion, optimizer, *data[1])
    found = {name: preconditioner.diagnostics[name] - counted[name] for name in RUNGS}
    after = theta(model)
    assert not torch.equal(before, after), "a block that keeps its state, or is refreshed on a higher rung, takes its step"
    plain(model, criterion, optimizer, *data[2])
    assert clean(preconditioner, model) and not torch.equal(theta(model), after)
    assert preconditioner.diagnostics["blocks_kept"] == found["blocks_kept"], "the next one holds"
    return {name: n for name, n in found.items() if n}, len(preconditioner.operators) or 1


def built(solver: str) -> Preconditioner:
    matrix, repr = CELLS[solver]
    return make(matrix, repr, solver, 1.0)


@pytest.mark.parametrize(
    ("failures", "rung", "how"),
    [(1, "retries_float64", raises), (1, "retries_float64", breaks), (2, "retries_damping", is_not_finite), (4, "retries_damping", raises),
     (5, "blocks_kept", breaks)],
)  # fmt: skip
@pytest.mark.parametrize("solver", solvers.names())
def test_every_solver_climbs_the_ladder(solver: str, failures: int, rung: str, how: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, blocks = train(built(solver), monkeypatch, failures if rung != "blocks_kept" else 1000, how)
    assert found == {rung: blocks}


@pytest.mark.parametrize("solver", ["cg", "krylov", "neumann", "heavy_ball", "psgd", "bfgs"])
def test_a_matrix_free_operator_is_damped_at_once(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"psgd": {}, "bfgs": {}}.get(solver, {})
    found, _ = train(make("ggn", "matrix_free", solver, 1.0, **options), monkeypatch, 1, raises)
    assert found == {"retries_damping": 1}


def test_a_bug_climbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> Any:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        train(built("eigen"), monkeypatch, 1, bug)


def test_nothing_is_counted_where_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for solver in solvers.names():
        assert train(built(solver), monkeypatch, 0, raises)[0] == {}
    assert set(CELLS) == set(precond.solvers.names())
