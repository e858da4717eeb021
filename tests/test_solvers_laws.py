"""Claims about solvers beyond their grid (`test_solvers.py`).

- A stack equals its blocks; a singular undamped operator raises, it gives no NaN; indefinite operators are taken, mended or refused.
- Identities 22 (SMW), 23 (exact Kronecker damping), 26 (powers), each with a case in which it fails.
- Learned inverses (`psgd`, `riemannian`) are linear, symmetric and positive at every refresh, and go on bit by bit from a file.
- `inverse`: blocks, powers, what is inverted is `damped`.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from precond.damping import Factored, Outside, Tikhonov
from precond.errors import InvalidCombination, SolverFailure, UsageError
from precond.inversion import inverse
from precond.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Gram,
    Kronecker,
    KroneckerEigen,
    LowRank,
    Operator,
    Shifted,
)
from precond.solvers import CG, LU, Cholesky, Eigen, Elementwise, create, get, names
from solver_grid import DIRECT, EXACT, LEARNED, ROWS, STRUCTURES, basis, conditioned, draw, eye, matrix_free, network, power_of, prepared


@pytest.mark.parametrize("solver", ["cholesky", "lu", "eigen", "cg"])
def test_a_stack_equals_its_blocks(solver: str) -> None:
    made, C, state, _ = prepared(solver, "dense_stack")
    assert isinstance(C, Dense)
    V = draw(4, 3)
    single = [made.apply(made.init(Dense(A), Tikhonov(0.1)), v)[0] for A, v in zip(C.matrix, V, strict=True)]
    assert_close(made.apply(state, V.flatten())[0], torch.cat(single), **EXACT)


def singular() -> dict[str, Operator]:
    u = draw(5, 1)
    return {
        "dense": Dense(u @ u.T),
        "zero": Dense(torch.zeros(3, 3, dtype=torch.float64)),
        "stack": Dense(torch.stack([eye(2), torch.ones(2, 2, dtype=torch.float64)])),
        "kronecker": Kronecker(eye(2), u @ u.T),
        "kronecker_diagonal": Kronecker(eye(2), torch.tensor([1.0, 0.0], dtype=torch.float64)),
        "diagonal": Diagonal(torch.tensor([1.0, 0.0], dtype=torch.float64)),
        "kronecker_eigen": KroneckerEigen((basis(2),), torch.tensor([0.0, 1.0], dtype=torch.float64)),
        "low_rank": LowRank(draw(2, 5)),
        "zero_rows": LowRank(torch.zeros(2, 3, dtype=torch.float64)),
        "gram": Gram([(draw(2, 3, 2), draw(2, 3, 2))]),
        "sparse_precision": network(u @ u.T, [[-1], [0], [1], [2], [3]]),
    }


@pytest.mark.parametrize("solver", DIRECT)
@pytest.mark.parametrize("name", singular())
def test_a_singular_operator_without_damping_raises_and_with_damping_does_not(solver: str, name: str) -> None:
    C, made = singular()[name], create(solver)
    if not made.takes(C):
        return
    with pytest.raises(SolverFailure, match="damping"):
        made.init(C, Tikhonov(0.0))
    state = made.init(C, made.natural_damping(type(C))(1e-3))
    assert made.apply(state, draw(C.n))[0].isfinite().all()


@pytest.mark.parametrize("solver", ["cholesky", "lu", "eigen"])
def test_pivots_and_eigenvalues_that_rounding_left_positive_are_not_taken_for_good_ones(solver: str) -> None:
    factors = [draw(6, 3, seed=s) for s in range(20)]
    for X in factors:
        with pytest.raises(SolverFailure):
            create(solver).init(Dense(X @ X.T), Tikhonov(0.0))
    good = torch.diag(torch.logspace(0, -12, 6, dtype=torch.float64))  # negative: badly conditioned is not singular
    assert_close(create(solver).apply(create(solver).init(Dense(good), Tikhonov(0.0)), good)[0], eye(6), **EXACT)


@pytest.mark.parametrize("solver", DIRECT)
def test_an_operator_that_is_not_finite_raises(solver: str) -> None:
    nan = torch.full((2, 2), torch.nan)
    C = {"elementwise": Diagonal(nan[0]), "smw": LowRank(nan), "sparse_cholesky": network(nan, [[-1], [0]])}.get(solver, Dense(nan))
    with pytest.raises(SolverFailure):
        create(solver).init(C, create(solver).natural_damping(type(C))(0.1))


def test_indefinite_operators() -> None:
    A = conditioned(4) - 0.3 * eye(4)
    M, v = Dense(A), draw(4)
    for solver in (LU(), Eigen()):  # neither needs a definite operator
        assert not solver.needs_definite
        assert_close(solver.apply(solver.init(M, Tikhonov(0.0)), v)[0], torch.linalg.solve(A, v), **EXACT)
    assert Cholesky().needs_definite
    with pytest.raises(SolverFailure, match="not positive definite"):
        Cholesky().init(M, Tikhonov(0.0))
    with pytest.raises(SolverFailure, match="clamp"):
        Eigen(power=0.5).init(M, Tikhonov(0.0))


def test_lu_says_what_becomes_of_negative_eigenvalues() -> None:
    U, d = basis(3), torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    C = Dense((U * d) @ U.T)
    absolute = LU(spectrum="abs")
    P = inverse(C, solver=absolute, damping=0.1)
    assert_close(P.to_dense(), (U / (d.abs() + 0.1)) @ U.T, **EXACT)
    assert_close(P.damped.to_dense(), (U * (d.abs() + 0.1)) @ U.T, **EXACT)
    K = Kronecker(C, Diagonal(torch.tensor([1.0, -3.0]).double()), scale=-2.0)
    e, V = torch.linalg.eigh(K.to_dense())
    assert_close(inverse(K, solver=absolute).to_dense(), (V / e.abs()) @ V.T, **EXACT)
    strict = LU(spectrum="raise")
    with pytest.raises(SolverFailure, match="indefinite"):
        strict.init(C, Tikhonov(0.1))
    assert_close(inverse(C, solver=strict, damping=1.5).to_dense(), (U / (d + 1.5)) @ U.T, **EXACT)
    with pytest.raises(ValueError, match="spectrum is one of"):
        LU(spectrum="clamp")  # type: ignore[arg-type]


def test_spectrum_says_what_becomes_of_negative_eigenvalues() -> None:
    d = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    U = basis(3)
    M = Dense((U * d) @ U.T)
    for spectrum, kept in (("keep", d), ("clamp", d.clamp(min=0)), ("abs", d.abs())):
        solver = Eigen(spectrum=spectrum)  # type: ignore[arg-type]
        expected = (U / (kept + 0.1)) @ U.T
        assert_close(solver.apply(solver.init(M, Tikhonov(0.1)), eye(3))[0], expected, **EXACT)
        assert_close(solver.damped(M, Tikhonov(0.1)).to_dense(), (U * (kept + 0.1)) @ U.T, **EXACT)
        diagonal = Elementwise(spectrum=spectrum)  # type: ignore[arg-type]
        assert_close(diagonal.apply(diagonal.init(Diagonal(d), Tikhonov(0.1)), torch.ones(3).double())[0], 1 / (kept + 0.1), **EXACT)
    root = Eigen(power=0.5, spectrum="abs")
    assert_close(root.apply(root.init(M, Outside(0.1)), eye(3))[0], (U / (d.abs().sqrt() + 0.1)) @ U.T, **EXACT)
    u = draw(4, 1)  # rounding leaves eigenvalues of either sign around zero: "auto" takes them as zero
    auto = Eigen(power=0.5)
    out = auto.apply(auto.init(Dense(u @ u.T), Tikhonov(1e-18)), u[:, 0])[0]
    assert_close(out, u[:, 0] / u.norm(), rtol=1e-6, atol=1e-6)  # 1e-18 ** -0.5 = 1e9 amplifies what rounding leaves off the direction u


def test_identity_22_smw() -> None:
    J, g, lam, N = draw(4, 9), draw(9, seed=1), 0.3, 4
    smw = (g - J.T @ torch.linalg.solve(N * lam * eye(4) + J @ J.T, J @ g)) / lam
    for name in ("cholesky", "lu", "eigen"):
        assert_close(inverse(Dense(J.T @ J / N), solver=name, damping=lam) @ g, smw, **EXACT)
    with pytest.raises(AssertionError):  # negative: N matters
        assert_close(inverse(Dense(J.T @ J), solver="cholesky", damping=lam) @ g, smw, **EXACT)


def test_identity_23_exact_damping_is_a_dense_solve_and_factored_damping_is_below_it() -> None:
    B, A, lam, g = conditioned(3, seed=1), conditioned(4, seed=2), 0.05, draw(12)
    C, M = Kronecker(B, A), torch.kron(B.contiguous(), A.contiguous())
    exact, factored = inverse(C, solver="eigen", damping=lam), inverse(C, solver="cholesky", damping=lam)
    assert_close(exact @ g, torch.linalg.solve(M + lam * eye(12), g), **EXACT)
    assert exact.quadratic_form(g) > factored.quadratic_form(g) > 0
    with pytest.raises(AssertionError):  # negative
        assert_close(exact @ g, factored @ g, **EXACT)
    assert_close(inverse(C, solver="eigen") @ g, inverse(C, solver="cholesky") @ g, **EXACT)  # equal without damping


@pytest.mark.parametrize("structure", ["dense", "kronecker", "kronecker_stack", "diagonal", "kronecker_eigen"])
def test_identity_26_powers(structure: str) -> None:
    C, g = STRUCTURES[structure](), draw(STRUCTURES[structure]().n)
    half, quarter, one = (inverse(C, solver="eigen", damping=0.1, power=p) for p in (0.5, 0.25, 1.0))
    assert_close(half @ (half @ g), one @ g, **EXACT)
    assert_close(quarter @ (quarter @ g), half @ g, **EXACT)
    outside = inverse(C, solver="eigen", damping=Outside(0.1), power=0.5)
    with pytest.raises(AssertionError):  # negative: outside the power it is another matrix
        assert_close(outside @ g, half @ g, **EXACT)


@pytest.mark.parametrize("solver", ["eigen", "elementwise", "smw", "krylov", "newton_schulz", "qr_iteration"])
def test_identity_26_powers_compose_for_every_solver_that_has_them(solver: str) -> None:
    assert {name for name, (_, _, powers) in ROWS.items() if powers} == {"eigen", "elementwise", "smw", "krylov", "newton_schulz", "qr_iteration"}
    C = STRUCTURES[{"elementwise": "kronecker_eigen", "smw": "low_rank"}.get(solver, "dense")]()
    g, options = draw(C.n), ROWS[solver][0]
    sixth, quarter, half, one = (inverse(C, solver=get(solver)(power=p, **options), damping=0.1) for p in (1 / 6, 0.25, 0.5, 1.0))
    assert_close(half @ (half @ g), one @ g, **EXACT)
    assert_close(quarter @ (quarter @ g), half @ g, **EXACT)
    assert_close(sixth @ (sixth @ (sixth @ g)), half @ g, **EXACT)
    with pytest.raises(AssertionError):  # negative
        assert_close(half @ g, one @ g, **EXACT)


LEARNED_FROM: dict[str, list[str]] = {
    "psgd": ["dense", "dense_stack", "diagonal", "kronecker", "kronecker_three", "kronecker_stack", "kronecker_eigen", "matrix_free", "gram"],
    "riemannian": ["dense", "dense_stack", "diagonal", "kronecker", "kronecker_three", "kronecker_stack"],
}


@pytest.mark.parametrize(("solver", "structure"), [(s, c) for s, found in LEARNED_FROM.items() for c in found])
def test_learned_inverses_keep_the_laws_at_every_refresh(solver: str, structure: str) -> None:
    """Linear, symmetric, positive, columns as vectors, and going on bit by bit from a file, long before they are the inverse."""
    made, C = create(solver), STRUCTURES[structure]()
    rule, V = made.natural_damping(type(C))(0.1), draw(C.n, 3, seed=4)
    state: dict[str, Any] = {}
    for _ in range(6):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        again, state = made.refresh(torch.load(file, weights_only=True), C, rule), made.refresh(state, C, rule)
        P = made.apply(state, eye(C.n))[0]
        assert torch.equal(made.apply(again, eye(C.n))[0], P)
        assert_close(P, P.T, **EXACT)
        assert torch.linalg.eigvalsh((P + P.T) / 2).min() > 0
        for result in (made.apply(state, V)[0], torch.stack([made.apply(state, v)[0] for v in V.T], 1)):
            assert_close(result, P @ V, **EXACT)
    assert set(LEARNED_FROM) == LEARNED


def test_shampoo_is_the_quarter_power_of_each_of_two_factors() -> None:
    L, R, G = conditioned(3, seed=1), conditioned(2, seed=2), draw(3, 2)
    P = inverse(Kronecker(L, R, exponent=0.5), solver="eigen", power=0.5)
    assert_close(P @ G.flatten(), (power_of(L, -0.25) @ G @ power_of(R, -0.25)).flatten(), **EXACT)


def test_natural_damping_is_exact_wherever_it_can_be() -> None:
    for name in names():
        factored = name in ("cholesky", "lu", "newton_schulz", "bfgs", "smw")
        if name in ROWS:
            assert create(name).natural_damping(Kronecker) is (Factored if factored else Tikhonov)
            assert create(name).natural_damping(Dense) is Tikhonov


def test_a_shift_of_the_users_own_is_part_of_the_operator() -> None:
    A, B = conditioned(3), conditioned(2)
    cases = ((Shifted(Dense(A), 0.2), ("cholesky", "lu", "eigen", "cg")), (Shifted(Kronecker(A, B), 0.2), ("eigen", "cg")))
    for C, solvers in cases:
        for name in solvers:
            P = inverse(C, solver=create(name) if name != "cg" else CG(tolerance=1e-14), damping=0.1)
            assert_close(P.to_dense(), torch.linalg.inv(C.to_dense() + 0.1 * eye(C.n)), **EXACT)
    assert not create("cholesky").takes(Shifted(matrix_free(), 0.1)) and create("cholesky").takes(Shifted(Dense(A), 0.1))
    with pytest.raises(InvalidCombination, match=r"Shifted\(MatrixFree\)"):
        create("cholesky").init(Shifted(matrix_free(), 0.1), Tikhonov(0.1))


def test_inverse_says_what_it_inverts_block_by_block() -> None:
    kron = Kronecker(conditioned(2, seed=1), conditioned(2, seed=2))
    blocks = {"a": Dense(conditioned(3)), "b": kron, "c": Diagonal(draw(2).abs() + 0.1)}
    positions = {"a": torch.tensor([9, 0, 1]), "b": torch.tensor([5, 6, 7, 8]), "c": torch.tensor([3, 2])}  # 4 is in no block
    C = BlockDiagonal(blocks, positions, n=10)
    for name in ("cholesky", "lu", "eigen", "cg"):
        P = inverse(C, solver=name if name != "cg" else CG(tolerance=1e-14), damping=0.1)
        covered = torch.tensor([i for i in range(10) if i != 4])
        inner = P.damped.to_dense()[covered][:, covered]
        assert_close(P.to_dense()[covered][:, covered], torch.linalg.inv(inner), **EXACT)
        assert not P.to_dense()[4].any()
    assert isinstance(P.blocks["c"].solver, CG)
    diagonal = inverse(C, solver="cholesky", damping=0.1).blocks["c"].solver
    assert isinstance(diagonal, Elementwise), "a diagonal block is inverted element by element"
    assert isinstance(inverse(C, solver=Eigen(power=0.5), damping=0.1).blocks["c"].solver, Eigen)


class DenseOnly(Eigen):
    """A solver with powers that takes no diagonal."""

    accepts = frozenset({Dense})


def test_a_diagonal_block_is_inverted_to_the_power_of_the_solver() -> None:
    d = draw(3).abs() + 0.1
    P = inverse(BlockDiagonal({"a": Diagonal(d), "b": Dense(eye(2))}), solver=DenseOnly(power=0.5), damping=0.1)
    assert_close(P.diagonal()[:3], (d + 0.1) ** -0.5, **EXACT)


def test_inverse_of_a_matrix_free_operator_is_live() -> None:
    C = matrix_free()
    P = inverse(C, solver=CG(tolerance=1e-14), damping=0.1)
    assert P.live and P.n == 5
    assert_close(P.to_dense(), torch.linalg.inv(C.to_dense() + 0.1 * eye(5)), **EXACT)
    assert_close(P.damped.to_dense(), C.to_dense() + 0.1 * eye(5), **EXACT)
    with pytest.raises(UsageError, match="pack or cast the operator"):
        P.to(dtype=torch.float32)


def test_inverse_agrees_with_itself_about_the_power() -> None:
    C = Dense(conditioned(3))
    assert inverse(C, solver="eigen").power == 1 and inverse(C, solver="eigen", power=0.5).power == 0.5
    assert inverse(C, solver=Eigen(power=0.5)).power == 0.5 and inverse(C, solver=Eigen(power=0.5), power=0.5).power == 0.5
    assert inverse(C, solver="cholesky", power=1.0).power == 1
    with pytest.raises(InvalidCombination, match="give one"):
        inverse(C, solver=Eigen(power=0.5), power=1.0)
    with pytest.raises(InvalidCombination, match="solvers with a power are eigen, elementwise, krylov, newton_schulz, qr_iteration, smw"):
        inverse(C, solver="cholesky", power=0.5)
    with pytest.raises(InvalidCombination, match="cannot invert a Diagonal"):  # alone, not as a block: what was asked for is refused
        inverse(Diagonal(draw(2)), solver="cholesky", damping=0.1)
    assert_close(inverse(C, solver="eigen", power=0.5).logdet(), -0.5 * torch.logdet(C.to_dense()), **EXACT)


def test_options_are_checked_when_made() -> None:
    for power in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive and finite"):
            Eigen(power=power)
    with pytest.raises(ValueError, match="spectrum is one of"):
        Elementwise(spectrum="square")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_iterations"):
        CG(max_iterations=0)
    with pytest.raises(ValueError, match="negative_curvature"):
        CG(negative_curvature="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", DIRECT)
def test_float32_state_stays_float32(solver: str) -> None:
    scale, made = torch.tensor(2.0, dtype=torch.float64), create(solver)
    others = {
        "elementwise": Diagonal(torch.ones(3)),
        "smw": LowRank(torch.eye(3)[:2]),
        "sparse_cholesky": network(torch.eye(3), [[-1], [0], [0]]),
    }
    C = others.get(solver, Kronecker(torch.eye(2), torch.eye(3), scale=scale))
    out, _ = made.apply(made.init(C, made.natural_damping(type(C))(torch.tensor(0.1, dtype=torch.float64))), torch.ones(C.n))
    assert out.dtype == torch.float32
