"""Claims about `psgd`, the factor learned by SGD.

- One update equals the paper's by whole matrices and loops (`dense_psgd`): dense, diagonal and Kronecker of order 1 to 3 with dense,
  diagonal and identity modes, stacks, low rank; both updates, both normalisers; Newton pairs and whitening.
- Fixed points (identity 28), by the expected update, which a full set of unit probes makes exact: P = |C|^-1 of pairs C v with C of
  either sign, E[g g^T]^(-1/2) of gradients, the Kronecker factors of a Kronecker C, a low-rank P. Controls: with single pairs an indefinite C
  leaves noise; a diagonal P of a dense C is not its inverse.
- Damping adds noise, so that P = (C^2 + delta^2 I)^(-1/2); Q of "EQ" stays triangular with a positive diagonal.
- The state is tensors and numbers, and goes on bit by bit after a round trip through a file.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dense_psgd
from precond.damping import Factored, Tikhonov
from precond.errors import InvalidCombination
from precond.operators import BlockDiagonal, Fit, Pairs
from precond.solvers import PSGD

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
NONE = Tikhonov(0.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    U = torch.linalg.qr(draw(len(values), len(values), seed=seed))[0]
    return (U * torch.tensor(values, dtype=torch.float64)) @ U.T


def function(A: Tensor, p: float) -> Tensor:
    """|A|^p."""
    d, U = torch.linalg.eigh((A + A.T) / 2)
    return (U * d.abs() ** p) @ U.T


def whole(solver: PSGD, state: dict[str, Any], n: int) -> Tensor:
    return solver.apply(state, torch.eye(n, dtype=torch.float64))[0]


def unit_pairs(C: Tensor, fit: Any, **options: Any) -> Pairs:
    """n pairs whose mean of v v^T is I exactly: the gradient that they give is the expected one."""
    v = len(C) ** 0.5 * torch.eye(len(C), dtype=torch.float64)
    return Pairs(v, v @ C, fit, **options)


FITS = {
    "dense": Fit((4,), ("dense",)),
    "diagonal": Fit((4,), ("diagonal",)),
    "kron": Fit((3, 2), ("dense", "dense")),
    "kron_mixed": Fit((3, 2), ("diagonal", "dense")),
    "kron_one_side": Fit((3, 2), ("identity", "dense")),
    "kron_three": Fit((2, 3, 2), ("dense", "dense", "diagonal")),
}


@pytest.mark.parametrize("normaliser", ["curvature", "largest"])
@pytest.mark.parametrize(("update", "whitening"), [("EQ", False), ("EQ", True), ("Q0.5EQ1.5", False), ("Q0.5EQ1.5", True)])
@pytest.mark.parametrize("name", FITS)
def test_updates_equal_the_papers_by_loops(name: str, update: Any, whitening: bool, normaliser: Any) -> None:
    fit = FITS[name]
    solver, state = PSGD(update=update, normaliser=normaliser, initial=0.8), dict[str, Any]()
    kept = sum(form != "identity" for form in fit.forms)
    factors = [
        (1.0 if form == "identity" else 0.8 ** (1 / kept)) * torch.eye(n, dtype=torch.float64) for n, form in zip(fit.sizes, fit.forms, strict=True)
    ]
    L = [0.0] * len(factors)
    for t in range(5):
        v, h = draw(2, fit.n, seed=2 * t), draw(2, fit.n, seed=2 * t + 1)
        state = solver.refresh(state, Pairs(v, h, fit, whitening=whitening), NONE)
        factors, L = dense_psgd.modes(
            factors, fit.forms, L, v, h, step=0.1 if normaliser == "curvature" else 0.01, update=update, whitening=whitening,
            largest=normaliser == "largest",
        )  # fmt: skip
    Q = dense_psgd.kron(factors)
    assert_close(whole(solver, state, fit.n), Q.T @ Q, **EXACT)
    with pytest.raises(AssertionError):  # negative: it has moved
        assert_close(Q.T @ Q, 0.64 * torch.eye(fit.n, dtype=torch.float64), rtol=1e-2, atol=1e-2)


def test_low_rank_updates_equal_the_papers() -> None:
    fit = Fit((5,), ("diagonal",), rank=2)
    solver = PSGD(initial=0.8, seed=3)
    state = solver.init(Pairs(draw(5), draw(5, seed=1), fit), NONE)
    U, V, d = (state["Q"][name] for name in "UVd")
    L, moved = {name: float(state["Q"][name]) for name in ("Lu", "Lv", "Ld")}, set()
    for t in range(1, 9):
        v, h = draw(5, seed=2 * t), draw(5, seed=2 * t + 1)
        before = state
        state = solver.refresh(state, Pairs(v, h, fit), NONE)
        U_moves = bool(state["Q"]["Lu"] != before["Q"]["Lu"])
        moved.add(U_moves)
        U, V, d = dense_psgd.low_rank(U, V, d, v, h, L, step=0.1, U_moves=U_moves)
        Q = (torch.eye(5, dtype=torch.float64) + U @ V.T) @ d.diag()
        assert_close(whole(solver, state, 5), Q.T @ Q, **EXACT)
    assert moved == {True, False}


def settle(solver: PSGD, pairs: Pairs, steps: int) -> Tensor:
    state: dict[str, Any] = {}
    for _ in range(steps):
        state = solver.refresh(state, pairs, NONE)
    return whole(solver, state, pairs.n)


@pytest.mark.parametrize("update", ["EQ", "Q0.5EQ1.5"])
def test_newton_pairs_lead_to_the_inverse_of_the_absolute_value(update: Any) -> None:
    C = with_spectrum([3.0, -1.0, 0.5, -2.0])
    P = settle(PSGD(update=update, step=0.5), unit_pairs(C, "dense"), 800)
    assert_close(P, function(C, -1), rtol=1e-9, atol=1e-9)  # what is left after so many steps
    with pytest.raises(AssertionError):  # negative: not the inverse of C itself
        assert_close(P, torch.linalg.inv(C), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("update", ["EQ", "Q0.5EQ1.5"])
def test_whitening_leads_to_the_inverse_root_of_the_covariance(update: Any) -> None:
    S = with_spectrum([4.0, 1.0, 0.25])
    v = 3**0.5 * torch.eye(3, dtype=torch.float64)
    gradients = 3**0.5 * torch.linalg.cholesky(S).T  # the mean of g g^T is S
    P = settle(PSGD(update=update, step=0.5), Pairs(v, gradients, "dense", whitening=True), 800)
    assert_close(P, function(S, -0.5), rtol=1e-9, atol=1e-9)
    assert_close(P @ S @ P, torch.eye(3, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def gone_on(solver: PSGD, pairs: Pairs, Q: dict[str, Tensor], steps: int) -> Tensor:
    """P after some steps from a given Q."""
    state = solver.init(pairs, NONE)
    state["Q"] = state["Q"] | Q
    for _ in range(steps):
        state = solver.refresh(state, pairs, NONE)
    return whole(solver, state, pairs.n)


@pytest.mark.parametrize("update", ["EQ", "Q0.5EQ1.5"])
def test_kronecker_factors_tend_to_those_of_a_kronecker_matrix_and_rest_there(update: Any) -> None:
    factors = [with_spectrum([1.4, -0.8], seed=1), with_spectrum([1.0, 1.5, 0.7], seed=2)]
    C, fit, solver = dense_psgd.kron(factors), Fit((2, 3), ("dense", "dense")), PSGD(update=update, step=0.2)
    target, pairs = function(C, -1), unit_pairs(C, fit)
    at = {str(m): function(F, -0.5).unsqueeze(0) for m, F in enumerate(factors)}
    if update == "EQ":  # the same P by triangular factors
        at = {m: torch.linalg.cholesky(Q @ Q).mT for m, Q in at.items()}
    assert_close(gone_on(solver, pairs, at, 20), target, **EXACT)
    errors = [(settle(solver, pairs, steps) - target).norm() for steps in (1, 40, 80)]
    assert errors[1] < errors[0] / 10 and errors[2] < errors[1] / 10
    other = with_spectrum([3.0, 1.0, 0.5, 2.0, 0.3, 1.5])
    with pytest.raises(AssertionError):  # negative: what is no Kronecker product has no such inverse
        assert_close(settle(solver, unit_pairs(other, fit), 300), torch.linalg.inv(other), rtol=0.1, atol=0.1)


def test_a_diagonal_recovers_a_diagonal_matrix_and_row_norms_of_any_other() -> None:
    d = torch.tensor([2.0, -0.5, 1.0], dtype=torch.float64)
    assert_close(settle(PSGD(step=0.5), unit_pairs(d.diag(), "diagonal"), 300), (1 / d.abs()).diag(), **EXACT)
    C = with_spectrum([3.0, 1.0, -0.5])
    assert_close(settle(PSGD(step=0.5), unit_pairs(C, "diagonal"), 300), (1 / C.norm(dim=1)).diag(), **EXACT)


def test_a_low_rank_factor_tends_to_an_inverse_of_its_form_and_rests_there() -> None:
    U, V, d = 0.5 * draw(4, 1), 0.5 * draw(4, 1, seed=1), torch.tensor([1.0, 0.7, 1.3, 1.0], dtype=torch.float64)
    Q = (torch.eye(4, dtype=torch.float64) + U @ V.T) @ d.diag()
    solver, pairs = PSGD(step=0.5), unit_pairs(torch.linalg.inv(Q.T @ Q), Fit((4,), ("diagonal",), rank=1))
    assert_close(gone_on(solver, pairs, {"U": U, "V": V, "d": d}, 20), Q.T @ Q, **EXACT)
    errors = [(settle(solver, pairs, steps) - Q.T @ Q).norm() for steps in (1, 200, 500)]
    assert errors[1] < errors[0] / 10 and errors[2] < errors[1] / 3


def test_single_pairs_settle_without_noise_on_a_definite_matrix_and_with_noise_on_an_indefinite_one() -> None:
    errors = []
    for C in (with_spectrum([3.0, 1.0, 0.5]), with_spectrum([3.0, -1.0, 0.5])):
        state, solver = dict[str, Any](), PSGD(step=0.5)
        for t in range(800):
            v = draw(3, seed=t)
            state = solver.refresh(state, Pairs(v, C @ v, "dense"), NONE)
        errors.append((whole(solver, state, 3) - function(C, -1)).norm())
    assert errors[0] < 1e-7 and errors[1] > 1e-3  # at the solution of a definite C, Q h = Q^-T v for every v


def test_damping_is_noise_in_h() -> None:
    C, delta, n = with_spectrum([1.0, -0.5, 0.1]), 0.3, 3
    state, solver = dict[str, Any](), PSGD(seed=1, initial=1.0)
    v = draw(1, n)
    state = solver.refresh(state, Pairs(v, v @ C, "dense"), Tikhonov(delta))
    noise = solver._noise(Pairs(v, v @ C, "dense"), 0)
    h = v @ C + (delta + torch.finfo(torch.float64).eps * (v @ C).abs()) * noise
    factors, _ = dense_psgd.modes([torch.eye(n, dtype=torch.float64)], ("dense",), [0.0], v, h, step=0.1)
    assert_close(whole(solver, state, n), factors[0].T @ factors[0], **EXACT)
    again = solver._noise(Pairs(v, v @ C, "dense"), 1)
    assert not torch.equal(again, noise) and solver._noise(Pairs(v, v, "dense", whitening=True), 1) is not again
    assert torch.equal(solver._noise(Pairs(v, v, "dense", whitening=True), 1), v)  # whitening: v itself
    # what noise of covariance delta^2 I leads to, by the expected update: pairs of C and of the noise have one mean of h h^T
    H = function(C @ C + delta**2 * torch.eye(n, dtype=torch.float64), 0.5)
    assert_close(settle(PSGD(step=0.5), unit_pairs(H, "dense"), 800), torch.linalg.inv(H), rtol=1e-9, atol=1e-9)
    with pytest.raises(InvalidCombination, match="Factored damping"):
        solver.init(Pairs(v, v, "dense"), Factored(0.1))


def test_q_stays_triangular_with_a_positive_diagonal_at_the_largest_step() -> None:
    solver, state = PSGD(step=1.0), dict[str, Any]()
    for t in range(200):
        state = solver.refresh(state, Pairs(draw(5, seed=t), 100 ** (t % 3) * draw(5, seed=-t - 1), "dense"), NONE)
        Q = state["Q"]["0"][0]
        assert torch.equal(Q, Q.triu()) and Q.diagonal().min() > 0
    assert torch.linalg.eigvalsh(whole(solver, state, 5)).min() > 0


def test_the_first_scale_is_that_of_the_first_pair() -> None:
    v, g = draw(6), draw(6, seed=1)
    for whitening, factor in ((True, 1.0), (False, float(v.square().mean() ** 0.25))):
        state = PSGD()._start(Pairs(v, g, "dense", whitening=whitening), g.unsqueeze(0), 0.5)
        scale = (g.pow(4).mean() + 0.5**4) ** -0.125 * factor
        assert_close(state["0"][0], scale * torch.eye(6, dtype=torch.float64), **EXACT)
    dead = PSGD().init(Pairs(v, 0 * g, "dense"), NONE)  # nothing came back to this layer
    assert whole(PSGD(), dead, 6).isfinite().all()


@pytest.mark.parametrize("name", [*FITS, "low_rank"])
def test_the_state_goes_on_bit_by_bit_after_a_round_trip(name: str) -> None:
    fit = FITS[name] if name in FITS else Fit((5,), ("diagonal",), rank=2)
    solver, n = PSGD(seed=2), fit.n
    runs = []
    for interrupted in (False, True):
        state: dict[str, Any] = {}
        for t in range(6):
            state = solver.refresh(state, Pairs(draw(n, seed=t), draw(n, seed=t + 50), fit), Tikhonov(0.1))
            if interrupted and t == 2:
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
        runs.append(whole(solver, state, n))
    assert torch.equal(*runs)
    assert_close(runs[0], runs[0].T, **EXACT)
    assert torch.linalg.eigvalsh(runs[0]).min() > 0


def test_a_stack_equals_its_blocks_and_blocks_of_a_block_diagonal_are_fitted_one_by_one() -> None:
    stack = Fit((2, 3), ("dense", "dense"), batch=2)
    v, h = draw(1, 12), draw(1, 12, seed=1)
    solver = PSGD(initial=0.7)
    P = whole(solver, solver.init(Pairs(v, h, stack), NONE), 12)
    single = [Pairs(v[:, part], h[:, part], Fit((2, 3), ("dense", "dense"))) for part in (slice(0, 6), slice(6, 12))]
    alone = [whole(solver, solver.init(pairs, NONE), 6) for pairs in single]
    assert_close(P, torch.block_diag(*alone), **EXACT)
    blocks = BlockDiagonal({"0": single[0], "1": single[1]})
    state = solver.init(blocks, NONE)
    assert_close(whole(solver, state, 12), torch.block_diag(*alone), **EXACT)
    after = solver.refresh(state, blocks, NONE)
    assert after["blocks"]["1"]["updates"] == 2 and not torch.equal(whole(solver, after, 12), whole(solver, state, 12))


def test_factors_are_balanced_now_and_then_and_their_product_is_as_it_was() -> None:
    fit, solver = Fit((2, 3), ("dense", "dense")), PSGD(step=1e-12)
    state = solver.init(Pairs(draw(6), draw(6, seed=1), fit), NONE)
    state["Q"] |= {"0": 10 * state["Q"]["0"], "1": state["Q"]["1"] / 10}
    before = whole(solver, state, 6)
    for _ in range(99):
        state = solver.refresh(state, Pairs(draw(6), draw(6, seed=1), fit), NONE)
    sizes = [state["Q"][m].abs().max() for m in "01"]
    assert_close(sizes[0], sizes[1], rtol=1e-8, atol=0)
    assert_close(whole(solver, state, 6), before, rtol=1e-8, atol=1e-8)


def test_options_and_operators_are_checked() -> None:
    for options, message in (
        ({"update": "QE"}, "choose 'EQ'"), ({"normaliser": "max"}, "'largest'"), ({"structure": "kronecker"}, "'low_rank'"), ({"probes": 0}, "at least 1"),
        ({"step": 2.0}, r"\(0, 1\]"), ({"decay": 1.0}, r"\[0, 1\)"), ({"initial": -1.0}, "positive"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PSGD(**options)  # type: ignore[arg-type]
