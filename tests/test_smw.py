"""Claims about the `smw` solver, beside those of the grid in `test_solvers.py`:

- identity 22: it equals the dense solve, and the push-through form where the right-hand side is in the row space; for `LowRank`, `Gram`,
  weights and stacks, with fewer rows than columns and with more;
- identity 26: powers compose; damping outside the power 1/2 is the formula of GGT; identity 27: it undoes the damped product;
- the pseudo-inverse needs no damping, leaves what is orthogonal to the rows at zero, and is AdaGrad's root and GGT's first step; eigenvalues
  below a tolerance or a threshold count as zero; `damped` says so;
- badly conditioned float32 operators are solved in float64, also through the ladder; without that the answer is wrong;
- `eigen` agrees, and takes the absolute value of an indefinite one; `cg` agrees.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from operator_specimens import (
    Maker,
    draw,
    eye,
    function,
    gram,
    gram_centred,
    gram_stack,
    low_rank,
    low_rank_full,
    low_rank_stack,
    low_rank_weighted,
)
from precond import numerics
from precond.damping import Damping, Outside, Tikhonov
from precond.errors import SolverFailure, UsageError
from precond.inversion import inverse
from precond.operators import Gram, LowRank, LowRankEigen, Operator, Shifted
from precond.solvers import CG, SMW, Eigen

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
ROWS: tuple[Maker, ...] = (low_rank, low_rank_full, low_rank_weighted, low_rank_stack, gram, gram_centred, gram_stack)
every = pytest.mark.parametrize("make", ROWS, ids=[m.__name__ for m in ROWS])


def clean(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of eigenvalues that takes what rounding leaves as zero."""
    return lambda d: f(torch.where(d.abs() > 1e-10, d, 0.0))


@every
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_identity_22_and_27(make: Maker, power: float, seed: int) -> None:
    C, M = make(seed)
    P = inverse(C, solver="smw", damping=0.3, power=power)
    assert_close(P.to_dense(), function(M, lambda d: (d + 0.3) ** -power), **EXACT)
    assert_close(P.damped.to_dense(), M + 0.3 * eye(C.n), **EXACT)
    v = draw(C.n, 2)
    if power == 1:
        assert_close(P @ (M @ v + 0.3 * v), v, **EXACT)
    assert_close(P.logdet(), -power * torch.logdet(M + 0.3 * eye(C.n)), **EXACT)


@every
def test_outside_damping(make: Maker) -> None:
    C, M = make(0)
    P = inverse(C, solver="smw", damping=Outside(0.3), power=0.5)
    assert_close(P.to_dense(), function(M, clean(lambda d: 1 / (d.clamp(min=0).sqrt() + 0.3))), **EXACT)
    with pytest.raises(AssertionError):  # negative: not the same as inside
        assert_close(P.to_dense(), inverse(C, solver="smw", damping=0.3, power=0.5).to_dense(), **EXACT)


def test_identity_22_push_through() -> None:
    J, lam, N = draw(4, 9), 0.3, 4
    g = J.T @ torch.full((N,), 1 / N, dtype=torch.float64)
    C = LowRank(J / N**0.5)
    solver = SMW()
    state = solver.init(C, Tikhonov(lam))
    expected = J.T @ torch.linalg.solve(J @ J.T + N * lam * eye(N), torch.ones(N, dtype=torch.float64))
    assert_close(solver.apply(state, g)[0], expected, **EXACT)
    assert_close(solver.apply_to_rows(state, torch.full((N,), N**-0.5, dtype=torch.float64)), expected, **EXACT)
    for make in (low_rank_weighted, low_rank_stack, gram, gram_stack):
        C, _ = make(1)
        assert isinstance(C, (LowRank, Gram))
        state, c, root = solver.init(C, Tikhonov(lam)), draw(*C.batch, C.rank), C.root_weights()
        assert_close(solver.apply_to_rows(state, c), solver.apply(state, C.right(root * c))[0], **EXACT)
    with pytest.raises(AssertionError):  # negative: outside the row space it is not the whole answer
        assert_close(C.right(C.left(draw(C.n))), draw(C.n), **EXACT)
    half = SMW(power=0.5)
    with pytest.raises(UsageError, match="power 1 and Tikhonov"):
        half.apply_to_rows(half.init(C, Tikhonov(lam)), draw(*C.batch, C.rank))


@every
def test_identity_26(make: Maker) -> None:
    C, _ = make(1)
    g = draw(C.n)
    half, quarter, one = (inverse(C, solver="smw", damping=0.1, power=p) for p in (0.5, 0.25, 1.0))
    assert_close(half @ (half @ g), one @ g, **EXACT)
    assert_close(quarter @ (quarter @ g), half @ g, **EXACT)


@every
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_eigen_and_cg_agree(make: Maker, power: float) -> None:
    C, _ = make(2)
    P = inverse(C, solver="smw", damping=0.2, power=power).to_dense()
    assert_close(inverse(C, solver=Eigen(power=power), damping=0.2).to_dense(), P, **EXACT)
    if power == 1:
        assert_close(inverse(C, solver=CG(tolerance=1e-14), damping=0.2).to_dense(), P, **EXACT)


def test_indefinite_rows() -> None:
    U, w = draw(2, 4), torch.tensor([2.0, -1.0], dtype=torch.float64)
    M = U.T @ torch.diag(w) @ U
    for name in ("smw", "eigen"):
        assert_close(inverse(LowRank(U, w), solver=name, damping=20.0).to_dense(), torch.linalg.inv(M + 20 * eye(4)), **EXACT)
    assert_close(
        inverse(LowRank(U, w), solver=Eigen(spectrum="abs"), damping=0.1).to_dense(), function(M, lambda d: 1 / (d.abs() + 0.1)), **EXACT
    )
    with pytest.raises(SolverFailure, match="indefinite"):
        inverse(LowRank(U, w), solver="smw", damping=0.1, power=0.5)


def test_a_shift_of_the_users_own_is_part_of_the_operator() -> None:
    C, M = gram(0)
    inverted, root = torch.linalg.inv(M + 0.3 * eye(C.n)), function(M + 0.3 * eye(C.n), lambda d: d**-0.5)
    for solver, expected in ((SMW(), inverted), (SMW(power=0.5), root), (SMW(tolerance=1e-12), inverted)):
        assert_close(inverse(Shifted(C, 0.2), solver=solver, damping=0.1).to_dense(), expected, **EXACT)


@every
@pytest.mark.parametrize("damping", [Tikhonov(0.0), Tikhonov(0.2), Outside(0.2)], ids=["none", "inside", "outside"])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_pseudo_inverse(make: Maker, damping: Damping, power: float) -> None:
    C, M = make(0)
    P = inverse(C, solver=SMW(power=power, complement="zero"), damping=damping)

    def wanted(d: Tensor) -> Tensor:
        shift = float(damping.value)
        inside = d + shift if isinstance(damping, Tikhonov) else (d.clamp(min=0) ** power + shift) ** (1 / power)
        return torch.where(d > 1e-10, inside**-power, 0.0)

    assert_close(P.to_dense(), function(M, wanted), rtol=1e-9, atol=1e-9)
    R = P._colour(eye(C.n))
    assert_close(R @ R.T, P.to_dense(), rtol=1e-9, atol=1e-9)
    if torch.linalg.matrix_rank(M, hermitian=True) < C.n:
        outside = torch.linalg.eigh(M)[1][:, 0]
        assert (P @ outside).norm() < 1e-9
        if damping.value == 0:
            with pytest.raises(SolverFailure, match=r"damping must be positive.*pseudo-inverse"):
                inverse(C, solver=SMW(power=power), damping=0.0)


def test_the_first_step_of_ggt_and_the_root_of_adagrad() -> None:
    g = draw(6)
    ggt = inverse(LowRank(g[None]), solver=SMW(power=0.5, complement="zero"))
    assert_close(ggt @ g, g / g.norm(), **EXACT)
    G, m = draw(3, 6), draw(6, seed=2)
    d, U = torch.linalg.eigh(G.T @ G)
    root = (U[:, -3:] / d[-3:].sqrt()) @ U[:, -3:].T
    assert_close(inverse(LowRank(G), solver=SMW(power=0.5, complement="zero")) @ m, root @ m, **EXACT)
    small = inverse(LowRank(g[None]), solver=SMW(power=0.5, complement="zero", threshold=float(g @ g) * 2))
    assert not (small @ g).any(), "a gradient below the threshold gives no step"


@pytest.mark.parametrize("cut", [{"tolerance": 0.1}, {"threshold": 0.1}])
@pytest.mark.parametrize("complement", ["damped", "zero"])
def test_small_eigenvalues_count_as_zero(cut: dict[str, float], complement: Any) -> None:
    V = torch.linalg.qr(draw(5, 5))[0].T
    d = torch.tensor([1.0, 0.5, 0.05, 0.01], dtype=torch.float64)
    P = inverse(LowRank(V[:4], d), solver=SMW(complement=complement, **cut), damping=0.2)
    rest = 0.0 if complement == "zero" else 1 / 0.2
    values = torch.tensor([1 / 1.2, 1 / 0.7, rest, rest, rest], dtype=torch.float64)
    assert_close(P.to_dense(), V.T @ torch.diag(values) @ V, **EXACT)
    damped = torch.where(values > 0, 1 / values, 0.0)
    assert_close(P.damped.to_dense(), V.T @ torch.diag(damped) @ V, **EXACT)


def badly_conditioned() -> tuple[LowRank, Tensor, float]:
    """Rows of norm 1 and a damping of 1e-8: in float32 nothing is left of 1 / (1 + 1e-8) - 1."""
    V = torch.linalg.qr(draw(6, 6))[0].T[:3]
    C = LowRank((V * torch.tensor([[1.0], [0.5], [0.25]], dtype=torch.float64)).float())
    return C, C.rows.double(), 1e-8


@pytest.mark.parametrize(("solver", "lost"), [(SMW(), 0.1), (SMW(power=0.5), 1e-4)], ids=["cholesky", "eigen"])
@pytest.mark.parametrize("kind", ["low_rank", "known_gram", "gram", "shifted"])
def test_bad_conditioning_is_solved_in_float64(solver: SMW, lost: float, kind: str) -> None:
    C, U, lam = badly_conditioned()
    kinds: dict[str, Operator] = {
        "low_rank": C,
        "known_gram": LowRank(C.rows, gram=C.gram),  # in float32: not good enough
        "gram": Gram([(C.rows.unsqueeze(1), torch.ones(3, 1, 1))]),
        "shifted": Shifted(C, lam / 2),
    }
    given, damping = kinds[kind], Tikhonov(lam / 2 if kind == "shifted" else lam)
    v = U.T @ draw(3)
    expected = function(U.T @ U, lambda d: torch.where(d > 1e-10, d + lam, torch.inf) ** -solver.power) @ v  # v is in the row space

    def error(x: Tensor) -> Tensor:
        """Relative, in the row space: rounding v to float32 alone leaves 6e-8 / lam off it."""
        return (U.T @ torch.linalg.solve(U @ U.T, U @ (x.double() - expected))).norm() / expected.norm()

    state = solver.init(given, damping)
    assert state["factor" if "factor" in state else "values"].dtype == torch.float64
    assert {t.dtype for t in state["rows"].values() if isinstance(t, Tensor)} <= {torch.float32}, "what is large is not held twice"
    result = solver.apply(state, v.float())[0]
    assert result.dtype == torch.float32
    assert error(result) < 1e-6
    climbed, rung = numerics.climb(solver.init, given, damping)
    assert rung == "ok"
    assert_close(solver.apply(climbed, v.float())[0], result, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert_close(solver.apply(torch.load(file, weights_only=True), v.float())[0], result, rtol=0, atol=0)
    plain = SMW(power=solver.power, promote=0.0)  # negative: in float32 the answer is lost
    assert error(plain.apply(plain.init(given, damping), v.float())[0]) > lost


def test_good_conditioning_stays_in_float32() -> None:
    C, _, _ = badly_conditioned()
    assert SMW().init(C, Tikhonov(1e-3))["factor"].dtype == torch.float32
    assert SMW(power=0.5).init(C, Outside(1e-2))["values"].dtype == torch.float32
    assert SMW(complement="zero").init(C, Tikhonov(0.0))["values"].dtype == torch.float32, "nothing cancels in a pseudo-inverse"


def test_conditioning_is_that_of_the_weighted_rows() -> None:
    V = torch.linalg.qr(draw(6, 6))[0].T[:3].float()
    weights = torch.tensor([1e8, 1e7, 1e6])
    assert SMW().init(LowRank(V, weights), Tikhonov(1.0))["factor"].dtype == torch.float64
    assert SMW().init(LowRank(V, torch.diag(weights)), Tikhonov(1.0))["values"].dtype == torch.float64
    assert SMW().init(LowRank(V), Tikhonov(1.0))["factor"].dtype == torch.float32


def test_a_tolerance_is_relative_to_each_matrix_of_a_stack() -> None:
    U = torch.stack([eye(2), 1e-3 * eye(2)]) * torch.tensor([[1.0], [0.1]], dtype=torch.float64)  # eigenvalues 1, 1e-2, 1e-6, 1e-8
    P = inverse(LowRank(U), solver=SMW(tolerance=0.1, complement="zero"))
    assert_close(P.diagonal(), torch.tensor([1.0, 0.0, 1e6, 0.0], dtype=torch.float64), **EXACT)


def test_options_are_checked_when_made() -> None:
    for options, message in (
        ({"power": 0.0}, "positive and finite"),
        ({"complement": "drop"}, "complement is one of damped, zero"),
        ({"tolerance": -1.0}, "at least 0"),
        ({"threshold": float("nan")}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SMW(**options)  # type: ignore[arg-type]


def test_damped_is_low_rank_where_eigenvalues_are_cut() -> None:
    assert isinstance(SMW(tolerance=0.1).damped(low_rank(0)[0], Tikhonov(0.1)), LowRankEigen)
    assert isinstance(SMW().damped(low_rank(0)[0], Tikhonov(0.1)), Shifted)
