"""Claims about the `newton_schulz` solver, beside those of the grid in `test_solvers.py`.

- Identity 26: roots 1, 2, 4 and 8 agree with those by eigendecomposition; a stack equals its matrices.
- The inverse starts from the last one where that is close, leaves the last iteration to the application, and is within the tolerance asked, down
  to 1e-10; a root never does.
- With Muon's coefficients, (G G^T)^(-1/2) G is Muon's loop on G; without, the polar factor U V^T of an SVD.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import precond
from precond.damping import PerFactor, Tikhonov
from precond.errors import InvalidCombination, SolverFailure
from precond.operators import Dense, Diagonal, Kronecker
from precond.representations import KronDim
from precond.solvers import NewtonSchulz
from solver_grid import EXACT, basis, conditioned, draw, eye, power_of

PRECISE = {"tolerance": 1e-13}


def muon(G: Tensor) -> Tensor:
    """As published, on the gradient itself."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        Y = X @ X.T
        X = 3.4445 * X + (-4.7750 * Y + 2.0315 * Y @ Y) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def one_sided(G: Tensor) -> Kronecker:
    rows, columns = G.shape
    return (
        Kronecker(G @ G.T, Diagonal(torch.ones(columns).double()))
        if rows <= columns
        else Kronecker(Diagonal(torch.ones(rows).double()), G.T @ G)
    )


def polar(G: Tensor, solver: NewtonSchulz) -> Tensor:
    return solver.apply(solver.init(one_sided(G), Tikhonov(0.0)), G.flatten())[0].reshape(G.shape)


@pytest.mark.parametrize("condition", [20.0, 1e6])
@pytest.mark.parametrize("root", [1, 2, 4, 8])
def test_identity_26_roots_agree_with_an_eigendecomposition(root: int, condition: float) -> None:
    A = torch.stack([3.0 * conditioned(8, condition, seed=s) for s in range(2)])
    solver = NewtonSchulz(power=1 / root, **PRECISE)
    out, state = solver.apply(solver.init(Dense(A), Tikhonov(0.0)), draw(16))
    expected = torch.cat([power_of(M, -1 / root) @ v for M, v in zip(A, draw(16).reshape(2, 8), strict=True)])
    assert_close(
        out, expected, rtol=1e-10 * condition / 20, atol=1e-10 * condition ** (1 / root)
    )  # as any inverse: rounding times the condition
    assert 5 < state["iterations"] < 60


def test_shampoo_per_factor_damping_needs_no_eigendecomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    L, R, G = conditioned(3, seed=1), conditioned(2, seed=2), draw(3, 2)
    expected = power_of(L + 0.1 * eye(3), -0.25) @ G @ power_of(R + 0.1 * eye(2), -0.25)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    solver = NewtonSchulz(power=0.5, **PRECISE)
    out, _ = solver.apply(solver.init(Kronecker(L, R, exponent=0.5), PerFactor(0.1)), G.flatten())
    assert_close(out.reshape(3, 2), expected, **EXACT)


def test_an_inverse_starts_from_the_last_one_where_that_is_close() -> None:
    A, move = conditioned(8), 0.01 * conditioned(8, seed=4)
    solver = NewtonSchulz(**PRECISE)
    state = solver.init(Dense(A), Tikhonov(0.1))
    warm = solver.refresh(state, Dense(A + move), Tikhonov(0.1))
    cold = solver.init(Dense(A + move), Tikhonov(0.1))
    assert warm["iterations"] <= 4 < cold["iterations"]
    exact = torch.linalg.inv(A + move + 0.1 * eye(8))
    assert_close(solver.apply(warm, eye(8))[0], exact, **EXACT)
    far = solver.refresh(state, Dense(20 * A), Tikhonov(0.1))
    assert far["iterations"] > 4
    assert_close(solver.apply(far, eye(8))[0], torch.linalg.inv(20 * A + 0.1 * eye(8)), **EXACT)
    half = NewtonSchulz(power=0.5)
    assert half.init(Dense(A), Tikhonov(0.1))["roots"] == {}  # negative: a root has no warm start


def departure(X: Tensor, A: Tensor) -> float:
    """|A^(1/2) X A^(1/2) - I| / |I|"""
    half = power_of(A, 0.5)
    return float((half @ X @ half - eye(len(A))).norm()) / len(A) ** 0.5


def test_an_iteration_left_to_the_application_squares_the_distance() -> None:
    A, move = conditioned(8, 1e4), conditioned(8, 1e4, seed=4)
    solver, before, after = NewtonSchulz(tolerance=1e-2), [], []
    state = solver.init(Dense(A), Tikhonov(0.0))
    for size in (1e-5, 1e-6):
        moved = solver.refresh(state, Dense(A + size * move), Tikhonov(0.0))
        assert moved["iterations"] == 0
        assert_close(moved["roots"], state["roots"], rtol=0, atol=0)
        X = solver.apply(moved, eye(8))[0]
        assert_close(X, X.T, **EXACT)
        before.append(departure(state["roots"]["0"], A + size * move))
        after.append(departure(X, A + size * move))
    assert after[0] < 8**0.5 * before[0] ** 2
    assert before[0] < 12 * before[1]  # negative: without it the distance is of first order
    assert after[0] > 50 * after[1]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-7, 1e-11])
def test_a_matrix_that_keeps_moving_is_followed_within_the_tolerance(tolerance: float) -> None:
    n, A = 40, conditioned(40, 1e4)
    solver = NewtonSchulz(tolerance=tolerance)
    state = solver.init(Dense(A), Tikhonov(1e-3))
    first, iterations, worst, stale = solver.apply(state, eye(n))[0], [], 0.0, 0.0
    for k in range(8):
        X = draw(n, n, seed=k)
        root = power_of(A, 0.5)
        A = 0.99 * A + 0.01 * root @ X @ X.T @ root / n  # an average of outer products, 1 % of it new
        state = solver.refresh(state, Dense(A), Tikhonov(1e-3))
        iterations.append(state["iterations"])
        worst = max(worst, departure(solver.apply(state, eye(n))[0], A + 1e-3 * eye(n)))
        stale = departure(first, A + 1e-3 * eye(n))
    assert worst < 1.01 * tolerance + 1e-12
    assert stale > 1e-2  # negative: the first inverse
    assert max(iterations) <= 4 and (sum(iterations) == 0) == (tolerance == 1e-2)


def test_a_kronecker_inverse_is_formed_and_an_indefinite_matrix_is_never_taken_for_close() -> None:
    solver, old = NewtonSchulz(**PRECISE), Kronecker(conditioned(3), conditioned(2))
    new = Kronecker(conditioned(3) + 0.01 * conditioned(3, seed=4), conditioned(2))
    state = solver.refresh(solver.init(old, PerFactor(0.1)), new, PerFactor(0.1))
    assert state["rest"] == {} and state["iterations"] < 5
    assert_close(solver.apply(state, eye(6))[0], torch.linalg.inv(PerFactor(0.1)(new).to_dense()), **EXACT)
    flipped = basis(8) @ torch.diag(torch.tensor([-1e-3, *[1.0] * 7]).double()) @ basis(8).T
    start = solver.init(Dense(flipped + 2e-3 * eye(8)), Tikhonov(0.0))
    with pytest.raises(SolverFailure):
        solver.refresh(start, Dense(flipped), Tikhonov(0.0))


def test_the_state_survives_a_file_bit_for_bit() -> None:
    A, move, solver = conditioned(8), 0.01 * conditioned(8, seed=4), NewtonSchulz()
    state = solver.refresh(solver.init(Dense(A), Tikhonov(0.1)), Dense(A + move), Tikhonov(0.1))
    assert set(state["rest"]) == {"0"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    states = [solver.refresh(s, Dense(A + 2 * move), Tikhonov(0.1)) for s in (state, loaded)]
    for one, other in ((state, loaded), tuple(states)):
        assert_close(solver.apply(one, eye(8))[0], solver.apply(other, eye(8))[0], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_muon_is_a_one_sided_root(shape: tuple[int, int]) -> None:
    G = draw(*shape)
    quintic = NewtonSchulz(power=0.5, coefficients="muon")
    assert_close(polar(G, quintic), muon(G), **EXACT)
    assert_close(polar(1e3 * G, quintic), polar(G, quintic), rtol=1e-6, atol=1e-6)  # but for the 1e-7 beside its norm
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert_close(polar(G, NewtonSchulz(power=0.5, **PRECISE)), U @ V, **EXACT)
    with pytest.raises(AssertionError):  # negative: five steps are no polar factor
        assert_close(polar(G, quintic), U @ V, rtol=1e-2, atol=1e-2)


def test_muon_of_a_gradient_without_full_rank_and_of_its_singular_values() -> None:
    G = draw(5, 2) @ draw(2, 6)
    quintic = NewtonSchulz(power=0.5, coefficients=(3.4445, -4.7750, 2.0315), steps=5)
    assert_close(polar(G, quintic), muon(G), rtol=1e-9, atol=1e-9)
    assert_close(polar(torch.zeros(2, 3).double(), quintic), torch.zeros(2, 3).double(), rtol=0, atol=0)
    sizes = torch.logspace(0, -2.5, 12, dtype=torch.float64)
    found = torch.linalg.svdvals(polar((basis(12) * sizes) @ basis(12, seed=1).T, quintic))
    assert 0.6 <= found.min() and found.max() <= 1.25
    with pytest.raises(SolverFailure, match="singular"):  # the exact one has no answer there without damping
        polar(G, NewtonSchulz(power=0.5))


def test_the_cell_of_muon() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 3)).double(), draw(5, 4), torch.randint(3, (5,))
    criterion = nn.CrossEntropyLoss()
    side = KronDim(merge_dims="rest", modes="shortest")
    C = precond.curvature(model, criterion, x, y, matrix="batched_empirical_fisher", repr=side)
    criterion(model(x), y).backward()
    block = next(block for block in C.blocks.values() if block.n == 12)
    assert isinstance(block, Kronecker)
    G = next(p.grad for p in model.parameters() if p.dim() == 2)
    assert G is not None
    P = precond.inverse(block, solver=NewtonSchulz(power=0.5, coefficients="muon"))
    assert_close((P @ G.flatten()).reshape(3, 4), muon(G), rtol=1e-9, atol=1e-9)


def test_what_is_refused() -> None:
    C = Kronecker(eye(2), eye(2), exponent=0.5)
    with pytest.raises(InvalidCombination, match="to be 2"):
        NewtonSchulz(power=0.5, coefficients="muon").init(C, Tikhonov(0.0))
    with pytest.raises(InvalidCombination, match="whole number"):
        NewtonSchulz(power=0.5).init(Kronecker(eye(2), eye(2), exponent=0.7), Tikhonov(0.0))
    for options in ({"power": 0.3}, {"power": 2.0}, {"steps": 0}, {"tolerance": 0.0}, {"coefficients": (1.0, 2.0)}):
        with pytest.raises(ValueError, match=r"1/q|needs|coefficients"):
            NewtonSchulz(**options)  # type: ignore[arg-type]
    for X in (draw(6, 3, seed=s) for s in range(5)):  # what rounding leaves of zero eigenvalues is no eigenvalue
        with pytest.raises(SolverFailure):
            NewtonSchulz().init(Dense(X @ X.T), Tikhonov(0.0))
    with pytest.raises(SolverFailure):
        NewtonSchulz().init(Dense(torch.diag(torch.tensor([1.0, -0.1]))), Tikhonov(0.0))
