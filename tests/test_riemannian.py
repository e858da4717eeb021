"""Claims about `riemannian`: INGD, SINGD and IKFAC.

- One update equals the papers' by loops (`dense_psgd.ingd`), in every group, and of three factors and of one by the same formula.
- IKFAC follows the running average of damped factors to first order in the step, and rests at their inverse root; in the limit of small
  steps it is K-FAC with per-factor damping. Diagonal, block and triangular groups are exact where the factor, or any root of it, lies
  in the group. Control: a diagonal K of a dense factor does not rest at its inverse.
- INGD rests where its two equations hold; without damping that is the exact inverse of the Kronecker product, its scale included.
- Dense INGD turns with an orthogonal change of basis; the diagonal group does not. Half precision needs no factorisation.
"""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dense_psgd
from precond.damping import Factored, PerFactor, Tikhonov
from precond.errors import InvalidCombination
from precond.operators import Dense, Diagonal, Kronecker
from precond.solvers import Cholesky, Riemannian

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def definite(n: int, seed: int = 0) -> Tensor:
    U = torch.linalg.qr(draw(n, n, seed=seed))[0]
    return (U * torch.linspace(0.5, 1.5, n, dtype=torch.float64)) @ U.T


def whole(solver: Riemannian, state: dict[str, Any], n: int) -> Tensor:
    return solver.apply(state, eye(n))[0]


def root(state: dict[str, Any], m: int = 0) -> Tensor:
    K: Tensor = state["factors"][str(m)]["K"][0]
    return K.diag() if K.dim() == 1 else K


def settle(solver: Riemannian, C: Any, damping: Any, steps: int) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for _ in range(steps):
        state = solver.refresh(state, C, damping)
    return state


@pytest.mark.parametrize("group", ["dense", "diagonal", "block", "lower", "upper"])
def test_updates_equal_the_papers_by_loops(group: Any) -> None:
    solver, state = Riemannian(group=group, step=0.1, momentum=0.4, block=2), dict[str, Any]()
    K, C, mK, mC = eye(3), eye(2), torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for t in range(4):
        A, B = definite(3, seed=t), definite(2, seed=t + 9)
        state = solver.refresh(state, Kronecker(B, A), Tikhonov(0.3))
        K, C, mK, mC = dense_psgd.ingd(K, C, A, B, mK, mC, damping=0.3, step=0.1, momentum=0.4, group=group, block=2)
    assert_close(whole(solver, state, 6), torch.kron((C @ C.T).contiguous(), (K @ K.T).contiguous()), **EXACT)
    zero = {"lower": root(state).triu(1), "upper": root(state).tril(-1), "diagonal": root(state) - root(state).diagonal().diag()}.get(group)
    assert zero is None or not zero.any()  # K has not left its group


def test_normalised_steps_are_shorter_and_weigh_the_new() -> None:
    A, B, wide = definite(3), definite(2, seed=1), 20.0
    made = settle(Riemannian(step=0.5, momentum=0.4, normalise=True), Kronecker(B, wide * A), Tikhonov(0.0), 1)
    for m, (H, other) in enumerate(((B, wide * A), (wide * A, B))):
        M = (1 - 0.4) * 0.5 * (torch.trace(other) / len(other) * H - eye(len(H)))
        assert_close(root(made, m), eye(len(H)) - 0.5 / M.abs().max().clamp(min=1) * M, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_ikfac_follows_the_running_average_of_damped_factors_to_first_order(seed: int) -> None:
    A, start, lam, errors = definite(4, seed=seed), definite(4, seed=seed + 5), 0.2, []
    K = torch.linalg.cholesky(torch.linalg.inv(start))
    for step in (1e-2, 5e-3, 2.5e-3):
        state = {"factors": {"0": {"K": K.unsqueeze(0), "M": torch.zeros(1, 4, 4, dtype=torch.float64)}}}
        new = root(Riemannian(method="ikfac", step=step).refresh(state, Kronecker(A), PerFactor(lam)))
        errors.append((torch.linalg.inv(new @ new.T) - (1 - step) * start - step * (A + lam * eye(4))).norm() / step**2)
    assert_close(errors[0], errors[2], rtol=0.05, atol=0)  # the error is a constant times step^2, up to the next order
    assert errors[2] > 1e-3 and errors[1] < errors[0] * 1.05  # negative: it is no running average exactly


def test_ikfac_is_k_fac_in_the_limit_of_small_steps() -> None:
    """Over a fixed stretch of changing factors, halving the step halves the distance to K-FAC with the average of the same weight."""
    distances = []
    for halvings in (0, 1, 2):
        step, state, A, B = 0.1 / 2**halvings, dict[str, Any](), eye(3) - 0.1 * eye(3), eye(2) - 0.1 * eye(2)
        solver = Riemannian(method="ikfac", step=step)
        for t in range(8):
            for _ in range(2**halvings):
                now = definite(3, seed=t), definite(2, seed=t + 20)
                state = solver.refresh(state, Kronecker(now[1], now[0]), PerFactor(0.1))
                A, B = ((1 - step) * old + step * new for old, new in zip((A, B), now, strict=True))
        kfac = Cholesky().apply(Cholesky().init(Kronecker(B, A), PerFactor(0.1)), eye(6))[0]
        distances.append(float((whole(solver, state, 6) - kfac).norm() / kfac.norm()))
    assert distances[0] < 0.05
    for coarse, fine in itertools.pairwise(distances):
        assert 1.6 < coarse / fine < 2.4


def test_ikfac_rests_at_the_inverse_of_the_damped_factors() -> None:
    C = Kronecker(definite(2, seed=1), definite(3), scale=0.5)
    for rule in (PerFactor(0.3), Factored(0.3)):
        state = settle(Riemannian(method="ikfac", step=0.5), C, rule, 80)
        assert_close(whole(Riemannian(), state, 6), torch.linalg.inv(rule(C).to_dense()), **EXACT)
    dense = settle(Riemannian(method="ikfac", step=0.5), Dense(definite(4)), Tikhonov(0.3), 80)
    assert_close(whole(Riemannian(), dense, 4), torch.linalg.inv(definite(4) + 0.3 * eye(4)), **EXACT)


@pytest.mark.parametrize("group", ["lower", "upper"])
def test_triangular_roots_rest_at_the_inverse_too(group: Any) -> None:
    state = settle(Riemannian(method="ikfac", group=group, step=0.2), Dense(definite(4)), Tikhonov(0.3), 300)
    assert_close(whole(Riemannian(), state, 4), torch.linalg.inv(definite(4) + 0.3 * eye(4)), **EXACT)


def test_diagonal_and_block_groups_are_exact_on_factors_of_their_form() -> None:
    blocks = torch.block_diag(definite(2), definite(2, seed=1))
    for group, A in (("diagonal", definite(4).diagonal().diag()), ("block", blocks)):
        state = settle(Riemannian(method="ikfac", group=group, step=0.5, block=2), Dense(A), Tikhonov(0.3), 80)  # type: ignore[arg-type]
        assert_close(whole(Riemannian(), state, 4), torch.linalg.inv(A + 0.3 * eye(4)), **EXACT)
        with pytest.raises(AssertionError):  # negative
            other = settle(Riemannian(method="ikfac", group=group, step=0.5, block=2), Dense(definite(4)), Tikhonov(0.3), 80)  # type: ignore[arg-type]
            assert_close(whole(Riemannian(), other, 4), torch.linalg.inv(definite(4) + 0.3 * eye(4)), rtol=1e-3, atol=1e-3)
    vector = settle(Riemannian(method="ikfac", step=0.5), Kronecker(definite(2).diagonal(), definite(3)), PerFactor(0.3), 80)
    assert vector["factors"]["0"]["K"].shape == (1, 2)  # a diagonal factor has a diagonal root
    inverses = [(1 / (definite(2).diagonal() + 0.3)).diag(), torch.linalg.inv(definite(3) + 0.3 * eye(3))]
    assert_close(whole(Riemannian(), vector, 6), dense_psgd.kron(inverses), **EXACT)


def test_ingd_rests_where_its_equations_hold() -> None:
    A, B, lam = definite(3), definite(2, seed=1), 0.2
    state = settle(Riemannian(step=0.3), Kronecker(B, A), Tikhonov(lam), 200)
    C, K = root(state, 0), root(state, 1)
    HK, HC = K.T @ A @ K, C.T @ B @ C
    assert_close(torch.trace(HC) / 2 * HK + lam * torch.trace(C.T @ C) / 2 * K.T @ K, eye(3), **EXACT)
    assert_close(torch.trace(HK) / 3 * HC + lam * torch.trace(K.T @ K) / 3 * C.T @ C, eye(2), **EXACT)
    with pytest.raises(AssertionError):  # negative: that is near the inverse of C + damping I, not equal to it
        assert_close(whole(Riemannian(), state, 6), torch.linalg.inv(torch.kron(B, A) + lam * eye(6)), rtol=1e-4, atol=1e-4)


def test_ingd_without_damping_rests_at_the_exact_inverse_of_any_number_of_factors() -> None:
    for C in (
        Kronecker(definite(2, seed=1), definite(3), scale=1.5),
        Kronecker(definite(2, seed=1), definite(2, seed=2).diagonal(), definite(2, seed=3)),
        Kronecker(
            torch.stack([definite(2, seed=s) for s in (1, 2)]), torch.stack([definite(2, seed=s) for s in (3, 4)]),
            scale=torch.tensor([1.0, 0.7]).double(),
        ),
        Dense(definite(3)),
        Diagonal(definite(3).diagonal()),
    ):  # fmt: skip
        state = settle(Riemannian(step=0.3), C, Tikhonov(0.0), 250)
        assert_close(whole(Riemannian(), state, C.n), torch.linalg.inv(C.to_dense()), **EXACT)


def test_dense_ingd_turns_with_the_basis_and_the_diagonal_group_does_not() -> None:
    A, B, U = definite(3), definite(2, seed=1), torch.linalg.qr(draw(3, 3, seed=7))[0]
    T = torch.kron(eye(2), U.contiguous())
    for group, turns in (("dense", True), ("diagonal", False)):
        solver = Riemannian(group=group, step=0.2)  # type: ignore[arg-type]
        plain = whole(solver, settle(solver, Kronecker(B, A), Tikhonov(0.1), 5), 6)
        turned = whole(solver, settle(solver, Kronecker(B, U @ A @ U.T), Tikhonov(0.1), 5), 6)
        assert torch.allclose(turned, T @ plain @ T.T, rtol=1e-10, atol=1e-10) is turns


def test_products_alone_work_in_half_precision() -> None:
    C = Kronecker(definite(2, seed=1).bfloat16(), definite(3).bfloat16())
    state = settle(Riemannian(method="ikfac", step=0.5), C, PerFactor(0.3), 40)
    P = Riemannian().apply(state, eye(6).bfloat16())[0]
    assert P.dtype == torch.bfloat16
    exact = torch.linalg.inv(PerFactor(0.3)(Kronecker(definite(2, seed=1), definite(3))).to_dense())
    assert (P.double() - exact).norm() < 0.03 * exact.norm()  # eight bits


def test_the_state_goes_on_bit_by_bit_after_a_round_trip() -> None:
    C, solver = Kronecker(definite(2, seed=1), definite(3)), Riemannian()
    state = settle(solver, C, Tikhonov(0.1), 3)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(whole(solver, solver.refresh(state, C, Tikhonov(0.1)), 6), whole(solver, solver.refresh(loaded, C, Tikhonov(0.1)), 6))


def test_options_and_damping_are_checked() -> None:
    for options, message in (
        ({"method": "ngd"}, "choose 'ingd'"), ({"group": "banded"}, "choose one of"), ({"group": ()}, "choose one of"),
        ({"step": 3.0}, "step lies"), ({"momentum": 1.0}, "momentum"),
        ({"initial": 0.0}, "positive"), ({"block": 0}, "positive"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Riemannian(**options)  # type: ignore[arg-type]
    C = Kronecker(definite(2), definite(3))
    with pytest.raises(InvalidCombination, match="PerFactor or Factored"):
        Riemannian(method="ikfac").init(C, Tikhonov(0.1))
    with pytest.raises(ValueError, match="names 1 groups for an operator of 2"):
        Riemannian(group=("dense",)).init(C, Tikhonov(0.1))
    assert Riemannian(group=["dense", "lower"]).group == ("dense", "lower")  # type: ignore[arg-type]  # as a recipe has it
    assert Riemannian(method="ikfac").natural_damping(Kronecker) is PerFactor and Riemannian().natural_damping(Kronecker) is Tikhonov


def test_a_spike_shrinks_the_inverse_by_a_half_at_most_and_is_forgotten() -> None:
    F = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    for method in ("ikfac", "ingd"):
        solver, state = Riemannian(method=method, step=0.3, momentum=0.0), dict[str, Any]()  # type: ignore[arg-type]
        rule = PerFactor(0.1) if method == "ikfac" else Tikhonov(0.1)
        for _ in range(300):
            state = solver.refresh(state, Dense(F), rule)
        rested = state["factors"]["0"]["K"]
        state = solver.refresh(state, Dense(1e30 * F), rule)
        after = state["factors"]["0"]["K"]
        assert bool(after.isfinite().all()) and 0.4 * rested.norm() < after.norm() < rested.norm()
        for _ in range(300):
            state = solver.refresh(state, Dense(F), rule)
        assert_close(state["factors"]["0"]["K"] @ state["factors"]["0"]["K"].mT, rested @ rested.mT, rtol=1e-9, atol=1e-9)
