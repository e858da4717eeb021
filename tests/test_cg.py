"""Claims about conjugate gradients, beside those of the grid in `test_solvers.py`.

- Identity 24: exact in as many iterations as there are distinct eigenvalues, the error falls in the norm of the matrix, the residual is
  orthogonal to the Krylov space; a zero right-hand side gives zero.
- Warm starts, preconditioners, Martens' stopping rule, negative curvature and the trust region; columns side by side.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Tikhonov
from precond.errors import SolverFailure, UsageError
from precond.operators import Dense, Diagonal, MatrixFree
from precond.solvers import CG, Cholesky, Jacobi
from precond.solvers.cg import _Solve
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


def cg_by_hand(A: Tensor, b: Tensor, P: Tensor, iterations: int) -> list[Tensor]:
    """Every iterate of preconditioned conjugate gradients from zero."""
    x, r = torch.zeros_like(b), b
    d, found = P @ b, [torch.zeros_like(b)]
    for _ in range(iterations):
        rz = r @ P @ r
        step = rz / (d @ A @ d)
        x, r = x + step * d, r - step * A @ d
        d = P @ r + (r @ P @ r) / rz * d
        found.append(x)
    return found


def test_preconditioners() -> None:
    A, b = conditioned(8, 1e3), draw(8)
    M = A + 0.1 * eye(8)
    for given, P in (
        ("jacobi", torch.diag(M.diagonal() ** -0.75)),
        (Jacobi(exponent=1.0), torch.diag(1 / M.diagonal())),
        (lambda damped: Dense(torch.linalg.inv(damped.to_dense() + eye(8))), torch.linalg.inv(M + eye(8))),
    ):
        solver = CG(max_iterations=3, tolerance=0.0, preconditioner=given)
        x, _ = solver.apply(solver.init(Dense(A), Tikhonov(0.1)), b)
        assert_close(x, cg_by_hand(M, b, P, 3)[-1], **EXACT)
        with pytest.raises(AssertionError):  # negative: without one it is elsewhere
            assert_close(x, cg_by_hand(M, b, eye(8), 3)[-1], **EXACT)
    exact = CG(preconditioner=lambda damped: Dense(torch.linalg.inv(damped.to_dense())))
    _, state = exact.apply(exact.init(Dense(A), Tikhonov(0.1)), b)
    assert state["iterations"] == 1
    live = MatrixFree(lambda v: torch.diag(torch.arange(1.0, 6).double()) @ v, 5, torch.float64, "cpu")
    probed = Jacobi(exponent=1.0, probes=3)(live)  # of a diagonal matrix every probe is exact
    assert_close(probed.diagonal(), 1 / torch.arange(1.0, 6).double(), **EXACT)


def test_martens_rule_stops_where_progress_is_small() -> None:
    A, b, eps = conditioned(60, 30.0), draw(60), 5e-4  # so that rounding has not parted two orders of summation by then
    iterates = cg_by_hand(A, b, eye(60), 59)
    phi = [float(x @ A @ x / 2 - b @ x) for x in iterates]
    stop = next(
        i for i in range(60) if i > max(10, math.ceil(0.1 * i)) and phi[i - (k := max(10, math.ceil(0.1 * i)))] < 0 and (phi[i] - phi[i - k]) / phi[i] < k * eps
    )  # fmt: skip
    solver = CG(progress=eps, tolerance=0.0, max_iterations=1000)
    x, state = solver.apply(solver.init(Dense(A), Tikhonov(0.0)), b)
    assert state["iterations"] == stop and 11 < stop < 59
    assert_close(x, iterates[stop], **EXACT)


def test_boundary_follows_negative_curvature_to_the_trust_region_and_never_leaves_it() -> None:
    A = Dense(torch.diag(torch.tensor([2.0, -0.1], dtype=torch.float64)))
    b = torch.ones(2).double()
    solver = CG(negative_curvature="boundary", radius=5.0)
    x, _ = solver.apply(solver.init(A, Tikhonov(0.0)), b)
    assert_close(x.norm(), torch.tensor(5.0).double(), **EXACT)
    first = b * 2 / 1.9
    r = b - A.matrix @ first
    d = r + (r @ r) / (b @ b) * b
    assert_close((x - first) / (x - first).norm(), d / d.norm(), **EXACT)  # along the direction of negative curvature
    definite, g = conditioned(6), draw(6)
    inside, outside = (CG(negative_curvature="boundary", radius=r, tolerance=1e-13) for r in (1e3, 0.5))
    assert_close(inside.apply(inside.init(Dense(definite), Tikhonov(0.0)), g)[0], torch.linalg.solve(definite, g), **EXACT)
    short = outside.apply(outside.init(Dense(definite), Tikhonov(0.0)), g)[0]
    assert_close(short.norm(), torch.tensor(0.5).double(), **EXACT)
    assert_close(short, 0.5 * g / g.norm(), **EXACT)  # the first step leaves it already


def test_columns_are_solved_side_by_side_and_each_stops_on_its_own() -> None:
    seen: list[int] = []
    d = torch.tensor([1.0, 1, 1, 2, 3, 4]).double()

    class Watched(Diagonal):
        def _matmul(self, V: Tensor) -> Tensor:
            seen.append(V.shape[1])
            return super()._matmul(V)

    B = torch.stack([eye(6)[0], eye(6)[0] + eye(6)[3], torch.ones(6).double(), torch.zeros(6).double()], 1)
    solver = CG(tolerance=1e-12)
    X = _Solve(solver, Watched(d), None, B, None, torch.ones(4).double()).run()[0]
    assert_close(X, B / d.unsqueeze(1), **EXACT)
    assert seen == [3, 2, 1, 1]  # after 1, 2 and 4 iterations, as many as they have eigenvalues; zero needs none


def test_options_are_checked_when_made() -> None:
    for options, message in (
        ({"progress": -1.0}, "progress"), ({"preconditioner": "ilu"}, "jacobi"), ({"negative_curvature": "boundary"}, "radius"),
        ({"radius": 1.0}, "radius"), ({"negative_curvature": "boundary", "radius": 1.0, "warm_start": 0.9}, "starts from zero"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            CG(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exponent"):
        Jacobi(exponent=0.0)


@pytest.mark.parametrize("preconditioner", [None, "jacobi"])
@pytest.mark.parametrize("size", [1e-30, 1e-21, 1e21, 1e30])
def test_it_is_linear_where_squares_leave_the_range_of_float32(size: float, preconditioner: Any) -> None:
    A, b = conditioned(6).float(), draw(6).float()
    solver = CG(tolerance=1e-6, preconditioner=preconditioner)
    state = solver.init(Dense(A), Tikhonov(0.1))
    one, _ = solver.apply(state, b)
    power = 2.0 ** round(math.log2(size))  # exact
    assert not torch.isfinite(1 / (b * power).square().sum()) or torch.isinf((b * power).square().sum())  # control: their squares are lost
    columns, _ = solver.apply(state, torch.stack([b, b * power], 1))
    assert_close(columns[:, 1] / power, columns[:, 0], rtol=0, atol=0)
    assert_close(solver.apply(state, b * power)[0] / power, one, rtol=0, atol=0)


def test_a_start_that_is_far_too_large_is_left_out() -> None:
    A, b = Dense(conditioned(6)), draw(6)
    warm = CG(warm_start=1.0, tolerance=1e-12)
    want = torch.linalg.solve(A.to_dense() + 0.1 * eye(6), b)
    spiked = warm.apply(warm.init(A, Tikhonov(0.1)), 1e30 * b)[1]
    assert (0.1 * spiked["x"] + A @ spiked["x"]).norm() > 1e29  # control: it is kept, and what rounding leaves of it is larger than the answer
    x, state = warm.apply(spiked, b)
    assert_close(x, want, **EXACT)
    assert warm.apply(state, b + 1e-3 * b.flip(0))[1]["iterations"] <= state["iterations"]  # one of the right size is taken
    assert not torch.equal(CG(warm_start=1.0, max_iterations=1).apply(state, 2 * b)[0], CG(max_iterations=1).apply(state, 2 * b)[0])
