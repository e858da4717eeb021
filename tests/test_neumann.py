"""Claims about the `neumann` solver, beside those of the grid in `test_solvers.py`.

- Identity 25: after K terms the error is (I - a C)^(K + 1) C^-1 b; it converges iff 0 < a lambda < 2; divergence is counted or reported.
- The step size it finds itself is below 1 / lambda_max; a carried iterate goes on with the series (LiSSA).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Tikhonov
from precond.errors import SolverFailure
from precond.operators import Dense
from precond.solvers import Neumann
from solver_grid import EXACT, conditioned, draw, eye

A, B = conditioned(6), draw(6)


def solve(solver: Neumann, matrix: Tensor, b: Tensor) -> tuple[Tensor, dict[str, object]]:
    return solver.apply(solver.init(Dense(matrix), Tikhonov(0.0)), b)


@pytest.mark.parametrize("terms", [1, 4, 30])
@pytest.mark.parametrize("step", [0.3, 1.0, 1.9])
def test_identity_25_the_error_is_a_power(terms: int, step: float) -> None:
    x, state = solve(Neumann(terms=terms, step_size=step), A, B)
    exact = torch.linalg.solve(A, B)
    error = torch.linalg.matrix_power(eye(6) - step * A, terms + 1) @ exact
    assert_close(exact - x, error, **EXACT)
    assert state["halvings"] == 0
    with pytest.raises(AssertionError):  # negative: not one power less
        assert_close(exact - x, torch.linalg.matrix_power(eye(6) - step * A, terms) @ exact, **EXACT)


def test_the_step_size_it_finds_is_safe_and_not_small() -> None:
    for seed in range(5):
        matrix = 7.0 * conditioned(40, 1e3, seed=seed)
        state = Neumann().init(Dense(matrix), Tikhonov(0.5))
        assert 0.8 < state["step_size"] * 1.1 * 7.5 <= 1 + 1e-12


@pytest.mark.parametrize(("step", "halvings"), [(1.99, 0), (2.01, 1), (10.0, 3)])
def test_a_step_that_diverges_is_halved_and_counted(step: float, halvings: int) -> None:
    x, state = solve(Neumann(terms=400, step_size=step), A, B)
    assert (state["halvings"], state["step_size"]) == (halvings, step / 2**halvings)
    exact = torch.linalg.solve(A, B)
    assert_close(exact - x, torch.linalg.matrix_power(eye(6) - step / 2**halvings * A, 401) @ exact, rtol=1e-8, atol=1e-8)


def test_divergence_is_reported() -> None:
    with pytest.raises(SolverFailure, match="negative eigenvalue"):
        solve(Neumann(terms=2000, step_size=1.0), torch.diag(torch.tensor([1.0, -0.5]).double()), torch.ones(2).double())
    with pytest.raises(SolverFailure, match="diverges"):
        solve(Neumann(step_size=2.5, halvings=0), A, B)
    with pytest.raises(SolverFailure):
        solve(Neumann(step_size=0.5), A, B * torch.nan)
    with pytest.raises(SolverFailure, match="zero"):
        Neumann().init(Dense(torch.zeros(2, 2)), Tikhonov(0.0))


def test_a_carried_iterate_goes_on_with_the_series() -> None:
    solver = Neumann(terms=4, step_size=0.7, warm_start=1.0)
    exact = torch.linalg.solve(A, B)
    _, state = solve(solver, A, B)
    x, _ = solver.apply(solver.refresh(state, Dense(A), Tikhonov(0.0)), B)
    assert_close(exact - x, torch.linalg.matrix_power(eye(6) - 0.7 * A, 9) @ exact, **EXACT)
    cold, _ = solve(Neumann(terms=4, step_size=0.7), A, B)
    assert (exact - x).norm() < (exact - cold).norm()


def test_options_are_checked_when_made() -> None:
    for options in ({"terms": 0}, {"halvings": -1}, {"power_iterations": 0}, {"step_size": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Neumann(**options)  # type: ignore[arg-type]
