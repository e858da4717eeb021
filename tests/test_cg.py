"""Claims about conjugate gradients, beside those of the grid in `test_solvers.py`.

- Identity 24: exact in as many iterations as there are distinct eigenvalues, the error falls in the norm of the matrix, the residual is
  orthogonal to the Krylov space; a zero right-hand side gives zero.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Tikhonov
from precond.errors import SolverFailure, UsageError
from precond.operators import (
    Dense,
)
from precond.solvers import CG, Cholesky
from solver_grid import EXACT, basis, conditioned, draw, eye, matrix_free, power_of


def test_identity_24_cg() -> None:
    U = basis(8)
    A = (U * torch.tensor([1.0, 1, 1, 2, 2, 5, 5, 5], dtype=torch.float64)) @ U.T
    b = draw(8)
    x = torch.linalg.solve(A, b)

    def run(k: int) -> tuple[Tensor, dict[str, Any]]:
        solver = CG(max_iterations=k, tolerance=1e-12)
        return solver.apply(solver.init(Dense(A), Tikhonov(0.0)), b)

    done, state = run(100)
    assert_close(done, x, **EXACT)
    assert state["iterations"] == 3 and state["residual"] < 1e-12  # three distinct eigenvalues
    errors = [((x - run(k)[0]) @ A @ (x - run(k)[0])).sqrt() for k in (1, 2, 3)]
    assert x @ A @ x > errors[0] ** 2 and errors[0] > errors[1] > 1e-3 > errors[2]  # monotone, and two steps are not enough
    span = torch.stack([b, A @ b], 1)
    assert_close(span.T @ (b - A @ run(2)[0]), torch.zeros(2).double(), **EXACT)  # the residual is orthogonal to the Krylov space
    zero, state = CG().apply(CG().init(Dense(A), Tikhonov(0.0)), torch.zeros(8).double())
    assert state["iterations"] == 0 and not zero.any()


def test_cg_warm_start() -> None:
    A, b = Dense(conditioned(6)), draw(6)
    warm = CG(warm_start=1.0)
    x, state = warm.apply(warm.init(A, Tikhonov(0.1)), b)
    again, after = warm.apply(warm.refresh(state, A, Tikhonov(0.1)), b)
    assert state["iterations"] > 2 and after["iterations"] == 0
    assert_close(again, x, **EXACT)
    cold = CG()
    _, state = cold.apply(cold.init(A, Tikhonov(0.1)), b)
    assert "x" not in cold.refresh(state, A, Tikhonov(0.1)), "a solver that starts from zero keeps no solution"
    columns, _ = warm.apply(after, draw(6, 2))  # another shape: starts from zero
    assert_close(columns, power_of(A.to_dense() + 0.1 * eye(6), -1) @ draw(6, 2), rtol=1e-8, atol=1e-8)  # cg's own tolerance


def test_cg_negative_curvature_and_breakdown() -> None:
    A, b = Dense(-eye(3)), draw(3)
    cg = CG()
    assert_close(cg.apply(cg.init(A, Tikhonov(0.0)), b)[0], b)  # at the first iteration the right-hand side itself
    mixed = Dense(torch.diag(torch.tensor([2.0, -0.1], dtype=torch.float64)))
    x, state = cg.apply(cg.init(mixed, Tikhonov(0.0)), torch.ones(2).double())
    assert state["iterations"] == 1
    assert_close(x, torch.full((2,), 2 / 1.9, dtype=torch.float64), **EXACT)  # one step of steepest descent
    strict = CG(negative_curvature="raise")
    with pytest.raises(SolverFailure, match="negative curvature"):
        strict.apply(strict.init(A, Tikhonov(0.0)), b)
    with pytest.raises(SolverFailure, match="not finite"):
        cg.apply(cg.init(Dense(eye(3)), Tikhonov(0.0)), b * torch.nan)
    with pytest.raises(SolverFailure, match="not finite"):
        cg.apply(cg.init(Dense(eye(3) * torch.nan), Tikhonov(0.0)), b)


def test_cg_needs_the_live_operator_of_the_step() -> None:
    C = matrix_free()
    cg = CG()
    state = cg.init(C, Tikhonov(0.1))
    with pytest.raises(UsageError, match="live operator"):
        cg.apply(state, draw(5))
    assert CG.live and not Cholesky.live
