"""Claims about solvers at the edges of precision, beside the exact grid of `test_solvers.py`.

- Direct solvers and those that end after n products stay within a multiple of eps times the condition number of the dense float64 answer: in
  float64 up to condition numbers of 1e10, and every cell of the grid in float32. Half precision is refused with the cast to make, but by
  `riemannian`, which is made for it.
- Zero, singular, indefinite and 1 x 1: each solver gives the dense answer, or what it documents, or raises a `SolverFailure` that says what to do;
  nothing that is not finite ever comes out. `MEANS` says which, by hand.
- `LSMR`'s damped least squares and `eigsh` of scipy: `oracles/test_scipy.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Tikhonov
from precond.errors import InvalidCombination, SolverFailure
from precond.operators import Dense, Diagonal, Kronecker, LowRank, MatrixFree, Operator
from precond.solvers import create, get, names
from solver_grid import ROWS, STRUCTURES, basis, conditioned, draw, eye, network, taken

SAFETY = 20  # times eps and the condition number; the largest found is 2.3
LOOSE = {"newton_schulz": {"tolerance": 1e-6}, "cg": {"tolerance": 1e-6}}
"""A residual that float32 can reach."""


def relative(P: Tensor, M: Tensor) -> Tensor:
    expected = torch.linalg.inv(M)
    return (P.double() - expected).norm() / expected.norm()


def bound(M: Tensor, dtype: torch.dtype) -> float:
    return SAFETY * torch.finfo(dtype).eps * float(torch.linalg.cond(M))


@pytest.mark.parametrize(("solver", "structure"), taken())
def test_float32_is_within_rounding_times_the_condition_number(solver: str, structure: str) -> None:
    made, C = get(solver)(**{**ROWS[solver][0], **LOOSE.get(solver, {})}), STRUCTURES[structure]()
    A = conditioned(5).float()
    narrow: Operator = MatrixFree(lambda v: A @ v, 5, torch.float32, "cpu") if C.live else C.to(torch.float32)
    rule = made.natural_damping(type(C))(0.1)
    P, _ = made.apply(made.init(narrow, rule), torch.eye(C.n), narrow)
    M = rule(C).to_dense()
    assert P.dtype == torch.float32
    assert relative(P, M) < bound(M, torch.float32)
    assert relative(P, M + 0.1 * eye(C.n)) > bound(M, torch.float32)  # negative: another damping is outside the bound


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
@pytest.mark.parametrize("solver", ["cholesky", "lu", "eigen", "qr_iteration", "bfgs", "smw", "krylov"])
def test_float64_is_within_rounding_times_the_condition_number(solver: str, condition: float) -> None:
    for n in (1, 2, 9):
        A = conditioned(n, condition, seed=n)
        C: Operator = LowRank(torch.linalg.cholesky(A).mT) if solver == "smw" else Dense(A)
        shift = float(torch.linalg.eigvalsh(A)[0])
        P = create(solver).apply(create(solver).init(C, Tikhonov(shift)), eye(n))[0]
        M = A + shift * eye(n)
        assert relative(P, M) < bound(M, torch.float64), n
    with pytest.raises(AssertionError):  # negative: a condition number of 1e10 leaves no ten digits
        assert_close(P, torch.linalg.inv(A), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", names())
def test_half_precision_is_refused_or_taken_by_name(solver: str, dtype: torch.dtype) -> None:
    narrow: dict[str, Operator] = {
        "elementwise": Diagonal(torch.ones(3)), "smw": LowRank(torch.eye(3)), "sparse_cholesky": network(torch.eye(3), [[-1], [0], [1]]),
    }  # fmt: skip
    C, made = narrow.get(solver, Dense(torch.eye(3))).to(dtype), create(solver)
    if solver == "riemannian":
        state = made.init(C, Tikhonov(0.1))
        assert made.half and made.apply(state, torch.ones(3, dtype=dtype))[0].dtype == dtype
        return
    with pytest.raises(InvalidCombination, match=r"cast it with operator.to\(torch.float32\)"):
        made.init(C, made.natural_damping(type(C))(0.1))
    made.init(C.to(torch.float32), made.natural_damping(type(C))(0.1))


# --- zero, singular, indefinite

Outcome = Literal["exact", "fails", "else"]  # else: finite, and what the solver documents
SIGNS = torch.tensor([2.0, -1.0, 0.5, 1.5, -0.7], dtype=torch.float64)
INDEFINITE = (basis(5) * SIGNS) @ basis(5).T
SINGULAR = draw(5, 1) @ draw(5, 1).T
# solver: (indefinite, zero or singular) without damping; damped, zero and singular are exact, or "else"
MEANS: dict[str, tuple[Outcome, Outcome, Outcome]] = {
    "cholesky": ("fails", "fails", "exact"),
    "lu": ("exact", "fails", "exact"),
    "eigen": ("exact", "fails", "exact"),
    "qr_iteration": ("exact", "fails", "exact"),
    "newton_schulz": ("fails", "fails", "exact"),
    "bfgs": ("fails", "fails", "exact"),
    "krylov": ("exact", "fails", "exact"),
    "cg": ("else", "else", "exact"),  # truncates at negative curvature, and takes no curvature for that
    "neumann": ("else", "else", "else"),  # so many terms of the series, or it fails where they grow
    "heavy_ball": ("else", "else", "else"),  # one step of many
    "psgd": ("else", "else", "else"),
    "riemannian": ("else", "else", "else"),
    "elementwise": ("exact", "fails", "exact"),
    "smw": ("exact", "fails", "exact"),
    "sparse_cholesky": ("fails", "fails", "exact"),
}


def operator(solver: str, M: Tensor) -> tuple[Operator, Tensor]:
    """M, or what is like it and the solver takes; and its dense matrix."""
    if solver == "elementwise":
        d = torch.where(torch.linalg.eigvalsh(M).abs() < 1e-10, 0.0, torch.linalg.eigvalsh(M))
        return Diagonal(d), d.diag()
    if solver == "smw":
        d, U = torch.linalg.eigh(M)
        rows = (U * d.abs().sqrt()).T
        C = LowRank(rows[d.abs() > 1e-10] if (d.abs() > 1e-10).any() else rows[:1], d.sign()[d.abs() > 1e-10] if (d.abs() > 1e-10).any() else None)
        return C, C.to_dense()
    if solver == "sparse_cholesky":
        C = network(M, [[-1]] * len(M))  # independent coordinates
        return C, M.diagonal().diag()
    return Dense(M), M


def check(solver: str, M: Tensor, damping: float, outcome: Outcome) -> None:
    C, A = operator(solver, M)
    made, v = create(solver), draw(len(M), seed=1)

    def run() -> Tensor:
        return made.apply(made.init(C, made.natural_damping(type(C))(damping)), v, C)[0]

    if outcome == "fails":
        with pytest.raises(SolverFailure, match=r"damping|spectrum|increase"):
            run()
        return
    try:
        x = run()
    except SolverFailure as error:
        assert outcome == "else" and "damping" in str(error)
        return
    assert bool(x.isfinite().all())
    if outcome == "exact":
        assert_close(A @ x + damping * x, v, rtol=1e-8, atol=1e-8)


def test_every_solver_says_what_it_does() -> None:
    assert set(MEANS) == set(names())


@pytest.mark.parametrize("solver", names())
def test_indefinite(solver: str) -> None:
    check(solver, INDEFINITE if solver != "sparse_cholesky" else SIGNS.diag(), 0.0, MEANS[solver][0])


@pytest.mark.parametrize("M", [torch.zeros(3, 3).double(), SINGULAR, torch.zeros(1, 1).double()], ids=["zero", "singular", "zero_1x1"])
@pytest.mark.parametrize("solver", names())
def test_zero_and_singular(solver: str, M: Tensor) -> None:
    if (solver, len(M)) != ("sparse_cholesky", 5):  # its independent coordinates are not singular there
        check(solver, M, 0.0, MEANS[solver][1])
    check(solver, M, 0.1, MEANS[solver][2])


@pytest.mark.parametrize("solver", names())
def test_one_by_one(solver: str) -> None:
    check(solver, torch.tensor([[2.0]]).double(), 0.1, "exact" if solver not in ("riemannian", "heavy_ball", "psgd") else "else")


def test_krylov_does_not_divide_by_what_rounding_leaves_of_zero() -> None:
    check("krylov", SINGULAR, 0.0, "fails")
    good = torch.diag(torch.logspace(0, -12, 5, dtype=torch.float64))  # negative: badly conditioned is not singular
    made = create("krylov")
    assert_close(made.apply(made.init(Dense(good), Tikhonov(0.0)), good @ torch.ones(5).double())[0], torch.ones(5).double(), rtol=1e-3, atol=1e-3)


# --- identity 24 and 27, for whole spaces


def test_identity_24_a_krylov_space_of_dimension_n_gives_any_function() -> None:
    A, b = conditioned(7) - 0.3 * eye(7), draw(7)
    d, U = torch.linalg.eigh(A)
    for options, f in (({}, 1 / d), ({"spectrum": "abs", "power": 0.5}, d.abs() ** -0.5), ({"spectrum": "abs", "power": 1 / 6}, d.abs() ** (-1 / 6))):
        made: Any = get("krylov")(steps=7, **options)
        x = made.apply(made.init(Dense(A), Tikhonov(0.0)), b)[0]
        assert_close(x, (U * f) @ (U.T @ b), rtol=1e-9, atol=1e-9)
        short: Any = get("krylov")(steps=4, **options)
        with pytest.raises(AssertionError):  # negative: a smaller space does not
            assert_close(short.apply(short.init(Dense(A), Tikhonov(0.0)), b)[0], x, rtol=1e-3, atol=1e-3)


def test_identity_23_no_damping_makes_factored_and_exact_equal_and_any_damping_orders_them() -> None:
    B, A = conditioned(3, seed=1), conditioned(4, seed=2)
    exact, factored = create("eigen"), create("cholesky")
    for value, equal in ((0.0, True), (0.05, False)):
        C = Kronecker(B, A)
        P, Q = (made.apply(made.init(C, made.natural_damping(Kronecker)(value)), eye(12))[0] for made in (exact, factored))
        least = float(torch.linalg.eigvalsh(P - Q)[0])
        assert (float((P - Q).norm()) < 1e-10) is equal and least > -1e-10  # g^T Q g <= g^T P g for every g
        scaled = Kronecker(3 * B, A / 3)
        assert_close(factored.apply(factored.init(scaled, factored.natural_damping(Kronecker)(value)), eye(12))[0], Q, rtol=1e-10, atol=1e-10)
