"""Claims about the `qr_iteration` solver, beside those of the grid in `test_solvers.py`, and about `precond.orthogonal`.

- It starts as `eigen`; its basis follows a matrix that moves, one step by hand, many steps to the eigenvectors.
- Within the tolerance the basis stays, and the criterion is that of the dense Q^T C Q; the error is first that of what is off its diagonal.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Damping, Factored, Outside, Tikhonov
from precond.inversion import inverse
from precond.operators import Dense, Kronecker, Shifted
from precond.orthogonal import follow, off_diagonal
from precond.solvers import QRIteration
from solver_grid import EXACT, basis, conditioned, draw, eye, power_of

OLD = conditioned(6, 50.0)
NEW = OLD + 0.01 * conditioned(6, 3.0, seed=4)


def ratio(A: Tensor, Q: Tensor) -> float:
    B = Q.T @ A @ Q
    return float((B - B.diag().diag()).norm() / B.norm())


def test_the_criterion_is_that_of_the_dense_matrix() -> None:
    for seed in range(3):
        A, Q = conditioned(6, seed=seed), basis(6, seed=seed + 1)
        assert_close(float(off_diagonal(A, (Q.T @ A @ Q).diagonal())), ratio(A, Q), **EXACT)
    assert off_diagonal(torch.zeros(2, 3, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_one_step_is_a_product_and_a_qr_with_columns_in_descending_order() -> None:
    Q = torch.linalg.eigh(OLD)[1]
    order = torch.tensor(sorted(range(6), key=lambda i: -float(Q[:, i] @ NEW @ Q[:, i])))
    expected = torch.linalg.qr(NEW @ Q[:, order])[0]
    found, values, steps = follow(NEW, Q, 1, 0.0)
    assert steps == 1
    assert_close((found.T @ expected).abs(), eye(6), **EXACT)  # up to signs
    assert_close(values, (found.T @ NEW @ found).diagonal(), **EXACT)
    assert ratio(NEW, found) < ratio(NEW, Q)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("damping", [Tikhonov(0.1), Outside(0.1)])
def test_many_steps_agree_with_the_eigendecomposition(power: float, damping: Damping) -> None:
    solver = QRIteration(power=power, steps=3000, tolerance=1e-7)
    state = solver.refresh(solver.init(Dense(OLD), damping), Dense(NEW), damping)
    assert 1 < state["steps"] < 3000
    expected = power_of(damping(Dense(NEW), power).to_dense(), -power)
    assert_close(solver.apply(state, eye(6))[0], expected, rtol=1e-5, atol=1e-5)  # tolerance 1e-7 beside a condition of 50
    single = QRIteration(power=power, tolerance=0.0)
    rough = single.apply(single.refresh(single.init(Dense(OLD), damping), Dense(NEW), damping), eye(6))[0]
    assert 1e-4 < (rough - expected).norm() / expected.norm() < 0.05  # negative: one step is not the eigendecomposition


def test_within_the_tolerance_the_basis_stays_and_the_spectrum_moves() -> None:
    Q = torch.linalg.eigh(OLD)[1]
    solver = QRIteration(tolerance=1.01 * ratio(NEW, Q))
    state = solver.init(Dense(OLD), Tikhonov(0.1))
    assert "steps" in state
    kept = solver.refresh(state, Dense(NEW), Tikhonov(0.1))
    assert kept["steps"] == 0
    assert_close(kept["bases"], state["bases"], rtol=0, atol=0)
    d = (Q.T @ NEW @ Q).diagonal()
    assert_close(solver.apply(kept, eye(6))[0], (Q / (d + 0.1)) @ Q.T, **EXACT)
    stricter = QRIteration(tolerance=0.99 * ratio(NEW, Q))
    assert stricter.refresh(state, Dense(NEW), Tikhonov(0.1))["steps"] == 1


def test_a_kronecker_operator_and_a_stack_follow_factor_by_factor() -> None:
    g = draw(6)
    solver = QRIteration(steps=3000, tolerance=1e-7)
    old, new = (Kronecker(conditioned(2, seed=s), conditioned(3, seed=s + 1), scale=2.0) for s in (1, 7))
    for damping in (Tikhonov(0.1), Factored(0.1)):
        state = solver.refresh(solver.init(old, damping), new, damping)
        assert_close(solver.apply(state, g)[0], torch.linalg.solve(damping(new).to_dense(), g), rtol=1e-5, atol=1e-5)
    first, second = (torch.stack([conditioned(3, seed=s), conditioned(3, seed=s + 1)]) for s in (1, 7))
    state = solver.refresh(solver.init(Dense(first), Tikhonov(0.1)), Dense(second), Tikhonov(0.1))
    expected = torch.linalg.solve(second + 0.1 * eye(3), g.reshape(2, 3, 1)).flatten()
    assert_close(solver.apply(state, g)[0], expected, rtol=1e-5, atol=1e-5)


def test_another_size_starts_afresh_and_a_shift_of_the_users_own_is_added() -> None:
    solver = QRIteration()
    state = solver.refresh(solver.init(Dense(conditioned(3)), Tikhonov(0.1)), Dense(OLD), Tikhonov(0.1))
    assert_close(solver.apply(state, eye(6))[0], torch.linalg.inv(OLD + 0.1 * eye(6)), **EXACT)
    P = inverse(Shifted(Dense(OLD), 0.2), solver=solver, damping=0.1)
    assert_close(P.to_dense(), torch.linalg.inv(OLD + 0.3 * eye(6)), **EXACT)
    for options in ({"steps": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="qr_iteration needs"):
            QRIteration(**options)  # type: ignore[arg-type]
