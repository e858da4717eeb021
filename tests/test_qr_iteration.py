"""Claims about the `qr_iteration` solver, beside those of the grid in `test_solvers.py`, and about `precond.orthogonal`.

- It starts as `eigen`; its basis follows a matrix that moves: far off by a QR step, close by rotations whose error squares.
- A matrix alone is inverted to first order in what its basis leaves off the diagonal: the formula is that of divided differences, the error is
  of second order, whatever the gaps, and within the tolerance asked, down to 1e-10.
- Within the tolerance the basis stays. What is applied is symmetric, and positive however far the matrix moved.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Damping, Factored, Floor, Outside, Relative, Tikhonov
from precond.inversion import inverse
from precond.numerics import symmetric_product
from precond.operators import Dense, Kronecker, Shifted
from precond.orthogonal import follow, rotations
from precond.solvers import QRIteration
from precond.solvers.first_order import relative_size, resolvents
from solver_grid import EXACT, basis, conditioned, draw, eye, power_of

OLD = conditioned(6, 50.0)
NEW = OLD + 0.01 * conditioned(6, 3.0, seed=4)


def rest(A: Tensor, Q: Tensor) -> Tensor:
    """What Q^T A Q has off its diagonal."""
    B = Q.T @ A @ Q
    return B - B.diag().diag()


def ratio(A: Tensor, Q: Tensor) -> float:
    return float(rest(A, Q).norm() / A.norm())


def relative(A: Tensor, Q: Tensor) -> Tensor:
    """G of a basis, by loops."""
    E, s = rest(A, Q), (Q.T @ A @ Q).diag()
    return torch.stack([torch.stack([E[i, j] / (s[i] * s[j]).abs().sqrt() for j in range(len(s))]) for i in range(len(s))])


def divided(s: Tensor, power: float) -> Tensor:
    """(s_i^-p - s_j^-p) / (s_i - s_j), by loops."""
    rows = []
    for i in range(len(s)):
        slope = -power * s[i] ** (-power - 1)
        rows.append(torch.stack([slope if s[i] == s[j] else (s[i] ** -power - s[j] ** -power) / (s[i] - s[j]) for j in range(len(s))]))
    return torch.stack(rows)


def dense(solver: QRIteration, state: dict[str, object], n: int) -> Tensor:
    return solver.apply(state, eye(n))[0]


def departure(X: Tensor, A: Tensor, power: float) -> float:
    """|A^(p/2) X A^(p/2) - I| / |I|"""
    half = power_of(A, power / 2)
    return float((half @ X @ half - eye(len(A))).norm()) / len(A) ** 0.5


# --- the basis


def test_what_is_left_has_the_norm_of_what_is_off_the_diagonal() -> None:
    for seed in range(3):
        A, Q = conditioned(6, seed=seed), basis(6, seed=seed + 1)
        same, d, N, steps = follow(A, Q, 0, 0.0)
        assert steps == 0
        assert_close((same, d), (Q, (Q.T @ A @ Q).diagonal()), **EXACT)
        assert_close((Q.T @ N, N.norm()), (rest(A, Q), rest(A, Q).norm()), **EXACT)
    assert follow(torch.zeros(2, 3, 3), torch.eye(3).expand(2, 3, 3), 5, 0.0)[3] == 0


def test_from_far_a_step_is_a_product_and_a_qr_with_columns_in_descending_order() -> None:
    Q = basis(6, seed=3)
    assert ratio(NEW, Q) > 0.1
    order = torch.tensor(sorted(range(6), key=lambda i: -float(Q[:, i] @ NEW @ Q[:, i])))
    expected = torch.linalg.qr(NEW @ Q[:, order])[0]
    found, d, _, steps = follow(NEW, Q, 1, 0.0)
    assert steps == 1
    assert_close((found.T @ expected).abs(), eye(6), **EXACT)  # up to signs
    assert_close(d, (found.T @ NEW @ found).diagonal(), **EXACT)
    assert ratio(NEW, found) < ratio(NEW, Q)


def test_from_close_what_is_off_the_diagonal_squares_and_stays_orthogonal() -> None:
    U = torch.linalg.eigh(NEW)[1]
    W = draw(6, 6, seed=2)
    for size in (1e-2, 1e-3, 1e-4):
        Q = torch.linalg.matrix_exp(size * (W - W.T)) @ U
        found = follow(NEW, Q, 1, 0.0)[0]
        assert_close(found.T @ found, eye(6), **EXACT)
        assert ratio(NEW, found) < 30 * ratio(NEW, Q) ** 2
        plain = torch.linalg.qr(NEW @ Q.flip(-1))[0]  # negative: orthogonal iteration gains a factor
        assert ratio(NEW, plain) > 0.1 * ratio(NEW, Q)


def test_rotations_diagonalise_two_by_two_matrices_whatever_the_gap() -> None:
    for gap in (0.0, 1e-9, 0.3, -5.0):
        d, E = torch.tensor([1.0, 1.0 + gap]).double(), torch.tensor([[0.0, 0.2], [0.2, 0.0]]).double()
        W = rotations(E, d)
        assert_close(W, -W.T, **EXACT)
        assert float(W.abs().max()) <= 1
        assert float(rest(d.diag() + E, torch.linalg.qr(eye(2) + W)[0]).abs().max()) < 1e-14
    assert_close(rotations(torch.zeros(3, 3), torch.ones(3)), torch.zeros(3, 3), rtol=0, atol=0)


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("damping", [Tikhonov(0.1), Outside(0.1), Floor(0.1), Relative(0.1)])
def test_a_few_steps_agree_with_the_eigendecomposition_to_1e_10(power: float, damping: Damping) -> None:
    solver = QRIteration(power=power, steps=20, tolerance=1e-13)
    state = solver.refresh(solver.init(Dense(OLD), damping), Dense(NEW), damping)
    assert 1 <= state["steps"] <= 5
    expected = power_of(damping(Dense(NEW), power).to_dense(), -power)
    assert_close(dense(solver, state, 6), expected, **EXACT)
    from_far = solver.refresh(solver.init(Dense(conditioned(6, 50.0, seed=9)), damping), Dense(NEW), damping)
    assert state["steps"] < from_far["steps"]
    rough = QRIteration(power=power, tolerance=0.5)
    stayed = rough.refresh(rough.init(Dense(OLD), damping), Dense(NEW), damping)
    assert stayed["steps"] == 0
    assert (dense(rough, stayed, 6) - expected).norm() > 1e-5 * expected.norm()  # negative: a tolerance that is not met


def test_from_anywhere_it_converges() -> None:
    solver = QRIteration(steps=3000, tolerance=1e-13)
    for seed in range(1, 5):
        state = solver.refresh(solver.init(Dense(conditioned(6, seed=seed)), Tikhonov(0.1)), Dense(OLD), Tikhonov(0.1))
        assert 1 < state["steps"] < 300
        assert_close(dense(solver, state, 6), torch.linalg.inv(OLD + 0.1 * eye(6)), **EXACT)


# --- first order


@pytest.mark.parametrize("power", [1.0, 0.9, 0.5, 0.25, 0.05])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_resolvents_are_the_divided_differences_of_the_power(power: float, scale: float) -> None:
    s = scale * torch.tensor([1e-6, 1e-3, 0.02, 0.5, 0.5, 3.0]).double()
    L = divided(s, power)
    for accuracy in (1e-3, 1e-6, 1e-12):
        U = resolvents(s[None], power, accuracy)[0]
        assert_close(-U @ U.T / L, torch.ones_like(L), rtol=max(accuracy, 1e-11), atol=0)
    assert power == 1 or float(((-resolvents(s[None], power, 1e-3)[0] @ resolvents(s[None], power, 1e-3)[0].T) / L - 1).abs().max()) > 1e-9


@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_a_basis_that_stays_inverts_to_first_order(power: float) -> None:
    Q = torch.linalg.eigh(OLD)[1]
    solver = QRIteration(power=power, tolerance=0.4)
    state = solver.init(Dense(OLD), Tikhonov(0.1))
    kept = solver.refresh(state, Dense(NEW), Tikhonov(0.1))
    assert kept["steps"] == 0
    assert_close(kept["bases"], state["bases"], rtol=0, atol=0)
    s, E = (Q.T @ NEW @ Q).diagonal() + 0.1, rest(NEW, Q)
    X = Q @ (torch.diag(s**-power) + divided(s, power) * E) @ Q.T
    first = float((divided(s, power) * E).norm())
    assert float((dense(solver, kept, 6) - X).norm()) < (1e-10 if power == 1 else 1e-3 * first)
    assert first > 1e-3  # negative: there is something to correct
    stricter = QRIteration(power=power, tolerance=1e-9)
    assert stricter.refresh(state, Dense(NEW), Tikhonov(0.1))["steps"] == 1


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_error_is_of_second_order_even_where_eigenvalues_meet(power: float) -> None:
    U, W = basis(8), draw(8, 8, seed=3)
    old = (U * torch.tensor([1.0, 1.0, 1.0, 1 + 1e-9, 1 + 1e-5, 2.0, 2.0, 5.0])) @ U.T
    solver = QRIteration(power=power, tolerance=0.1)
    state = solver.init(Dense(old), Tikhonov(0.1))
    errors, plain = [], []
    for size in (1e-2, 1e-3):
        new = old + size * (W + W.T) / 2
        exact = power_of(new + 0.1 * eye(8), -power)
        moved = solver.refresh(state, Dense(new), Tikhonov(0.1))
        assert moved["steps"] == 0
        errors.append(float((dense(QRIteration(power=power, tolerance=1e-6), moved, 8) - exact).norm()))
        Q = moved["bases"]["0"][0]
        plain.append(float(((Q * ((Q.T @ new @ Q).diag() + 0.1) ** -power) @ Q.T - exact).norm()))
    assert errors[0] > (80 if power == 1 else 20) * errors[1]
    assert plain[0] < 12 * plain[1]  # negative: the diagonal alone is of first order
    assert errors[0] < 0.1 * plain[0]


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-7, 1e-11])
def test_a_matrix_that_keeps_moving_is_followed_within_the_tolerance(power: float, tolerance: float) -> None:
    n, A = 40, conditioned(40, 1e4)
    solver = QRIteration(power=power, tolerance=tolerance, steps=10)
    state = solver.init(Dense(A), Tikhonov(1e-3))
    first, steps, worst, stale = state["bases"]["0"], [], 0.0, 0.0
    for k in range(8):
        X = draw(n, n, seed=k)
        root = power_of(A, 0.5)
        A = 0.99 * A + 0.01 * root @ X @ X.T @ root / n  # an average of outer products, 1 % of it new
        state = solver.refresh(state, Dense(A), Tikhonov(1e-3))
        steps.append(state["steps"])
        damped = A + 1e-3 * eye(n)
        worst = max(worst, departure(dense(solver, state, n), damped, power))
        s = (first[0].T @ damped @ first[0]).diag()
        stale = departure((first[0] * s**-power) @ first[0].T, damped, power)
    assert worst < 1.3 * tolerance + 1e-12
    assert stale > 1e-3  # negative: the first basis and the diagonal alone
    assert max(steps) <= 5 and (sum(steps) == 0) == (tolerance == 1e-2)


def test_the_size_of_what_is_left_is_estimated_to_a_quarter() -> None:
    for seed in range(5):
        A, Q = conditioned(30, 100.0, seed=seed), torch.linalg.eigh(conditioned(30, 100.0, seed=seed) + 1e-3 * conditioned(30, seed=seed + 7))[1]
        Q, d, N, _ = follow(A[None], Q[None], 0, 0.0)
        assert 0.75 < float(relative_size(Q, d, N, d)) / float(relative(A, Q[0]).norm()) < 1.25
    U = torch.linalg.eigh(A)[1][None]
    assert relative_size(*follow(A[None], U, 0, 0.0)[:3], d).tolist() == [0.0]  # rounding is none
    shifted = torch.stack([A, 2 * A])
    both = relative_size(*follow(shifted, Q.expand(2, 30, 30), 0, 0.0)[:3], torch.stack([d[0], 2 * d[0]]))
    assert_close(both[0], both[1], **EXACT)


def test_it_is_positive_and_symmetric_however_far_the_matrix_moved() -> None:
    least = []
    for seed in range(5):
        for power in (1.0, 0.5):
            A, B = conditioned(12, 1e3, seed=seed), conditioned(12, 1e3, seed=seed + 5)
            solver = QRIteration(power=power, tolerance=1e-9)
            state = solver.refresh(solver.init(Dense(A), Tikhonov(1e-4)), Dense(B), Tikhonov(1e-4))
            X, Q = dense(solver, state, 12), state["bases"]["0"][0]
            assert_close(X, X.T, **EXACT)
            assert float(torch.linalg.eigvalsh(X)[0]) > 0
            G = relative(B + 1e-4 * eye(12), Q)
            least.append(float(torch.linalg.eigvalsh(eye(12) - G)[0]))
    assert min(least) < 0  # negative: with all of what is off the diagonal it would not be


def test_other_dampings_leave_out_what_is_off_the_diagonal() -> None:
    Q = torch.linalg.eigh(OLD)[1]
    d = (Q.T @ NEW @ Q).diagonal()
    for damping, solver, expected in (
        (Floor(0.1), QRIteration(), d.clamp(min=0.1) ** -1),
        (Outside(0.1), QRIteration(power=0.5), 1 / (d.sqrt() + 0.1)),
        (Tikhonov(0.1), QRIteration(spectrum="abs"), 1 / (d + 0.1)),
        (Tikhonov(0.1), QRIteration(power=2.0), (d + 0.1) ** -2),
    ):
        state = solver.refresh(solver.init(Dense(OLD), damping), Dense(NEW), damping)
        assert state["steps"] == 0 and "rest" not in state
        assert_close(dense(solver, state, 6), (Q * expected) @ Q.T, **EXACT)
    exact = QRIteration(tolerance=0.0)
    assert_close(dense(exact, exact.init(Dense(OLD), Tikhonov(0.1)), 6), torch.linalg.inv(OLD + 0.1 * eye(6)), **EXACT)


def test_an_indefinite_matrix_is_inverted_to_first_order_too() -> None:
    U = basis(6, seed=2)
    old, move = (U * torch.tensor([-3.0, -1.0, 0.5, 1.0, 2.0, 4.0])) @ U.T, draw(6, 6)
    solver, errors = QRIteration(), []
    for size in (1e-3, 1e-4):
        new = old + size * (move + move.T)
        state = solver.refresh(solver.init(Dense(old), Tikhonov(0.1)), Dense(new), Tikhonov(0.1))
        assert state["steps"] == 0
        errors.append(float((dense(solver, state, 6) - torch.linalg.inv(new + 0.1 * eye(6))).norm()))
    assert errors[0] > 80 * errors[1] > 0


def test_the_state_survives_a_file_bit_for_bit() -> None:
    solver = QRIteration(power=0.5)
    state = solver.refresh(solver.init(Dense(OLD), Tikhonov(0.1)), Dense(NEW), Tikhonov(0.1))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_close(dense(solver, loaded, 6), dense(solver, state, 6), rtol=0, atol=0)
    again = [dense(solver, solver.refresh(s, Dense(NEW + 0.01 * eye(6)), Tikhonov(0.1)), 6) for s in (state, loaded)]
    assert_close(again[0], again[1], rtol=0, atol=0)


# --- structures


def test_a_symmetric_product_is_the_product() -> None:
    for n in (1, 5, 64, 65, 200, 530):
        X, A = draw(2, n, n), torch.stack([draw(n, n, seed=s) + draw(n, n, seed=s).T for s in range(2)])
        assert_close(symmetric_product(X, A @ X), X.mT @ A @ X, **EXACT)
        assert_close(symmetric_product(X[0], A[0] @ X[0]), X[0].T @ A[0] @ X[0], **EXACT)


def test_a_kronecker_operator_and_a_stack_follow_factor_by_factor() -> None:
    g = draw(6)
    solver = QRIteration(steps=3000, tolerance=1e-12)
    old, new = (Kronecker(conditioned(2, seed=s), conditioned(3, seed=s + 1), scale=2.0) for s in (1, 7))
    for damping in (Tikhonov(0.1), Factored(0.1)):
        state = solver.refresh(solver.init(old, damping), new, damping)
        assert_close(solver.apply(state, g)[0], torch.linalg.solve(damping(new).to_dense(), g), **EXACT)
    first, second = (torch.stack([conditioned(3, seed=s), conditioned(3, seed=s + 1)]) for s in (1, 7))
    state = solver.refresh(solver.init(Dense(first), Tikhonov(0.1)), Dense(second), Tikhonov(0.1))
    expected = torch.linalg.solve(second + 0.1 * eye(3), g.reshape(2, 3, 1)).flatten()
    assert_close(solver.apply(state, g)[0], expected, **EXACT)


def test_another_size_starts_afresh_and_a_shift_of_the_users_own_is_added() -> None:
    solver = QRIteration()
    state = solver.refresh(solver.init(Dense(conditioned(3)), Tikhonov(0.1)), Dense(OLD), Tikhonov(0.1))
    assert_close(solver.apply(state, eye(6))[0], torch.linalg.inv(OLD + 0.1 * eye(6)), **EXACT)
    P = inverse(Shifted(Dense(OLD), 0.2), solver=solver, damping=0.1)
    assert_close(P.to_dense(), torch.linalg.inv(OLD + 0.3 * eye(6)), **EXACT)
    for options in ({"steps": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="qr_iteration needs"):
            QRIteration(**options)  # type: ignore[arg-type]
