"""Claims about the `heavy_ball` solver (CurveBall), beside those of the grid in `test_solvers.py`.

- From zero the first step is the Cauchy step; every later one minimises the model over the span of iterate and residual, and so does a
  step after C and b have moved.
- With rho and beta given, C and b fixed, it tends to (C + (1 - rho) / beta I)^-1 b, which is what `damped` says.
- One product an iteration, one more where rho and beta are chosen; it never waits for the device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Tikhonov
from precond.operators import Dense, MatrixFree
from precond.solvers import HeavyBall
from solver_grid import EXACT, conditioned, draw, eye

A, B = conditioned(6) + 0.1 * eye(6), draw(6)
STATE = HeavyBall().init(Dense(conditioned(6)), Tikhonov(0.1))


def test_the_first_step_is_the_cauchy_step() -> None:
    x, _ = HeavyBall().apply(STATE, B)
    assert_close(x, (B @ B) / (B @ A @ B) * B, **EXACT)


def test_a_step_minimises_over_the_span_of_iterate_and_residual() -> None:
    moved, b = conditioned(6, seed=3), draw(6, seed=9)
    x, state = HeavyBall().apply(STATE, B)
    for matrix, target in ((A, B), (A, B), (moved + 0.1 * eye(6), b)):
        r = target - matrix @ x
        solver = HeavyBall()
        new, state = solver.apply(solver.refresh(state, Dense(matrix), Tikhonov(0.0)), target)
        V = torch.stack([x, r], 1)
        assert_close(new, V @ torch.linalg.solve(V.T @ matrix @ V, V.T @ target), **EXACT)
        assert (target - matrix @ new).norm() > 1e-3  # negative: it is no solve
        x = new


def test_the_published_system_has_the_same_step() -> None:
    x, state = HeavyBall().apply(STATE, B)
    z, g = -x, B  # the published gradient is that of the loss: the direction x solves C x = g
    D = A @ z + g
    G = torch.tensor([[D @ A @ D, D @ A @ z], [D @ A @ z, z @ A @ z]])
    beta, minus_rho = torch.linalg.solve(G, torch.stack([g @ D, g @ z]))
    assert_close(-HeavyBall().apply(state, B)[0], -minus_rho * z - beta * D, **EXACT)


@pytest.mark.parametrize("rho", [0.9, 1.0])
def test_given_coefficients_have_the_limit_that_damped_says(rho: float) -> None:
    solver = HeavyBall(rho=rho, beta=0.5, iterations=1000)
    C = Dense(conditioned(6))
    damped = solver.damped(C, Tikhonov(0.1)).to_dense()
    assert_close(damped, A + (1 - rho) / 0.5 * eye(6), **EXACT)
    assert_close(solver.apply(solver.init(C, Tikhonov(0.1)), B)[0], torch.linalg.solve(damped, B), **EXACT)
    one = HeavyBall(rho=rho, beta=0.5)
    x, state = one.apply(one.init(C, Tikhonov(0.1)), B)
    assert_close(one.apply(state, B)[0], rho * x + 0.5 * (B - A @ x), **EXACT)


@pytest.mark.parametrize(("options", "products"), [({}, 2), ({"iterations": 5}, 6), ({"rho": 0.9, "beta": 0.1, "iterations": 5}, 5)])
def test_products(options: dict[str, float], products: int) -> None:
    count = 0

    def product(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return A @ v

    C, solver = MatrixFree(product, 6, torch.float64, "cpu"), HeavyBall(**options)  # type: ignore[arg-type]
    solver.apply(solver.init(C, Tikhonov(0.1)), B, C)
    assert count == products


def test_it_stays_where_there_is_no_residual_and_at_zero() -> None:
    solver = HeavyBall()
    state = solver.init(Dense(2 * eye(3)), Tikhonov(0.0))
    x, state = solver.apply(state, torch.ones(3).double())
    again, state = solver.apply(state, torch.ones(3).double())
    assert_close((x, again), (torch.full((3,), 0.5).double(),) * 2, rtol=0, atol=0)
    zero, _ = solver.apply(solver.init(Dense(torch.zeros(3, 3).double()), Tikhonov(0.0)), torch.ones(3).double())
    assert not zero.any()


def test_it_never_waits_for_the_device() -> None:
    for options in ({}, {"rho": 0.9, "beta": 0.1}):
        solver = HeavyBall(iterations=2, **options)  # type: ignore[arg-type]
        state = solver.init(Dense(torch.empty(3, 3, device="meta")), Tikhonov(0.1))
        x, state = solver.apply(state, torch.empty(3, device="meta"))  # reading a meta tensor on the host raises
        assert solver.apply(state, x)[0].shape == (3,)


def test_options_are_checked_when_made() -> None:
    for options in ({"rho": 0.9}, {"rho": 1.1, "beta": 0.1}, {"rho": 0.9, "beta": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="heavy_ball"):
            HeavyBall(**options)  # type: ignore[arg-type]
