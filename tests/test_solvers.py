"""Claims about solvers.

The grid, solvers x structures x damping x powers, walks the registry: every cell equals the dense inverse power of the damped matrix to
1e-10, or is refused with the reason; `refused` states which by rules that do not look at the code. A solver with no row in `ROWS` fails a
test.

- Laws of every solver (identity 27): solve(M, M v + l v) == v; linear, symmetric and positive; columns equal single vectors; a zero
  right-hand side gives zero; a stack equals its blocks; 1x1 works; a singular undamped operator raises, it gives no NaN; the state is read
  by torch.load(weights_only=True); applying a direct solver never waits for the device.
- Identities 22 (SMW), 23 (exact Kronecker damping), 24 (CG), 26 (powers), each with a case in which it fails.
- `inverse`: blocks, powers, what is inverted is `damped`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Damping, Factored, Outside, Tikhonov
from precond.errors import InvalidCombination, SolverFailure, UnknownName, UsageError
from precond.inversion import inverse, with_power
from precond.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Gram,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    LowRank,
    MatrixFree,
    Operator,
    Probed,
    Secant,
    SecantKronecker,
    SecantMemory,
    Shifted,
    Sparse,
    SparsePrecision,
)
from precond.solvers import CG, LU, Cholesky, Eigen, Elementwise, Solver, create, get, names

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
DIRECT = ("cholesky", "lu", "eigen", "elementwise", "smw", "sparse_cholesky")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(n, n, seed=seed))[0]


def conditioned(n: int, condition: float = 20.0, seed: int = 0) -> Tensor:
    """A definite matrix of this condition number."""
    U, d = basis(n, seed), torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    return (U * d) @ U.T


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def power_of(M: Tensor, p: float) -> Tensor:
    """By an eigendecomposition of the whole matrix, with no code of ours."""
    d, U = torch.linalg.eigh((M + M.T) / 2)
    return (U * d**p) @ U.T


def network(F: Tensor, parents: list[list[int]]) -> SparsePrecision:
    """Of one or two parents each, absent ones -1."""
    table = torch.tensor(parents)
    own = torch.cat([torch.arange(len(F)).unsqueeze(1), table.clamp(min=0)], 1)
    return SparsePrecision(F[own.unsqueeze(2), own.unsqueeze(1)], table)


def matrix_free() -> Operator:
    A = conditioned(5)
    return MatrixFree(lambda v: A @ v, 5, torch.float64, "cpu")


def rows_of(M: Tensor) -> Tensor:
    """U with U^T U = M."""
    U: Tensor = torch.linalg.cholesky(M).mT
    return U


STRUCTURES: dict[str, Callable[[], Operator]] = {
    "dense": lambda: Dense(conditioned(6)),
    "dense_1x1": lambda: Dense(torch.tensor([[2.0]], dtype=torch.float64)),
    "dense_stack": lambda: Dense(torch.stack([conditioned(3, seed=s) for s in range(4)])),
    "secant": lambda: Secant(conditioned(5), draw(5), draw(5, seed=1)),
    "secant_kronecker": lambda: SecantKronecker(Secant(conditioned(3), draw(3), draw(3, seed=1)), Probed(conditioned(2), draw(2))),
    "secant_memory": lambda: SecantMemory(draw(2, 5), draw(2, 5) @ conditioned(5), torch.tensor(2.0, dtype=torch.float64)),
    "diagonal": lambda: Diagonal(conditioned(5).diagonal()),
    "kronecker": lambda: Kronecker(conditioned(3, seed=1), conditioned(2, seed=2)),
    "kronecker_three": lambda: Kronecker(conditioned(2, seed=1), conditioned(2, seed=2).diagonal(), conditioned(3, seed=3), scale=0.5),
    "kronecker_stack": lambda: Kronecker(torch.stack([conditioned(3, seed=s) for s in range(2)]), Diagonal(draw(2, 2).abs() + 0.2)),
    "kronecker_power": lambda: Kronecker(conditioned(3, seed=1), conditioned(2, seed=2), exponent=0.5, scale=torch.tensor(2.0).double()),
    "kronecker_eigen": lambda: KroneckerEigen((basis(2), basis(3)), draw(2, 3).abs() + 0.2),
    "kronecker_sum": lambda: KroneckerSum(Kronecker(conditioned(2, seed=1), conditioned(3, seed=2)), Kronecker(eye(2), conditioned(3))),
    "kronecker_axes": lambda: KroneckerSum(conditioned(3, seed=1), conditioned(2, seed=2).diagonal(), scale=0.5),
    "low_rank": lambda: LowRank(rows_of(conditioned(5))),
    "low_rank_stack": lambda: LowRank(torch.stack([rows_of(conditioned(3, seed=s)) for s in range(3)]), draw(3, 3).abs() + 0.5),
    "low_rank_eigen": lambda: LowRank(rows_of(conditioned(4))[:2]).spectral().map(lambda s: s + 0.1),
    "gram": lambda: Gram([(draw(8, 2, 2), draw(8, 2, 3, seed=1)), draw(8, 1, seed=2)]),
    "matrix_free": matrix_free,
    "sparse": lambda: Sparse(torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 2, 3]]), draw(5).abs() + torch.tensor([2.0, 0, 2, 1, 1]).double(), 4),
    "sparse_precision": lambda: network(conditioned(5), [[3, -1], [0, 3], [-1, -1], [-1, -1], [1, 2]]),
}
DAMPINGS: dict[str, Damping] = {"none": Tikhonov(0.0), "tikhonov": Tikhonov(0.1), "outside": Outside(0.1), "factored": Factored(0.1)}
DENSE = {"dense", "dense_1x1", "dense_stack", "secant"}
KRONECKER = {"kronecker", "kronecker_three", "kronecker_stack", "kronecker_power", "secant_kronecker"}
ROW_FORMS = {"low_rank", "low_rank_stack", "gram"}
FOLLOWS = {"bfgs"}
"""Solvers that go on from their state: the same operator twice is two steps."""
# name: (options, structures it takes, whether it has powers)
ROWS: dict[str, tuple[dict[str, Any], set[str], bool]] = {
    "cholesky": ({}, DENSE | KRONECKER, False),
    "lu": ({}, DENSE | KRONECKER, False),
    "eigen": (
        {},
        DENSE | KRONECKER | ROW_FORMS | {"diagonal", "kronecker_eigen", "kronecker_axes", "kronecker_sum", "low_rank_eigen"},
        True,
    ),
    "elementwise": ({}, {"diagonal", "kronecker_eigen", "low_rank_eigen"}, True),
    "smw": ({}, ROW_FORMS | KRONECKER, True),
    "bfgs": ({}, {"secant", "secant_kronecker", "secant_memory"}, False),
    "sparse_cholesky": ({}, {"sparse_precision"}, False),
    "cg": ({"tolerance": 1e-14}, set(STRUCTURES), False),
}


def refused(solver: str, structure: str, damping: str, power: float) -> str | None:
    """Why a cell has no meaning, or None."""
    _, takes, powers = ROWS[solver]
    if power != 1 and not powers:
        return "applies the power -1 only"
    if structure not in takes:
        return "cannot invert a"
    if damping == "factored" and structure not in DENSE | KRONECKER | {"diagonal"}:
        return "Factored damping needs Kronecker factors"
    if (solver, structure) == ("eigen", "kronecker_sum"):
        return "no eigendecomposition"
    if solver in ("cholesky", "lu", "bfgs", "smw") and structure in KRONECKER and (damping in ("tikhonov", "outside") or power != 1):
        return "use Factored damping"
    if solver == "sparse_cholesky" and damping in ("tikhonov", "outside"):
        return "use Blockwise damping"
    return None


def cells() -> list[Any]:
    return [
        pytest.param(solver, structure, damping, power, id=f"{solver}-{structure}-{damping}-{power}")
        for solver in ROWS
        for structure in STRUCTURES
        for damping in DAMPINGS
        for power in (1.0, 0.5, 0.25)
    ]


def test_every_solver_of_the_registry_has_a_row_in_the_grid() -> None:
    assert set(names()) == set(ROWS)
    for name in ROWS:
        assert get(name).name == name and create(name) == create(get(name)) == get(name)()
    with pytest.raises(UnknownName, match="did you mean 'cholesky'"):
        create("cholesky_")


@pytest.mark.parametrize(("solver", "structure", "damping", "power"), cells())
def test_equals_the_dense_inverse_power_of_the_damped_matrix_or_is_refused(solver: str, structure: str, damping: str, power: float) -> None:
    C, rule = STRUCTURES[structure](), DAMPINGS[damping]
    why = refused(solver, structure, damping, power)
    if why is not None:
        with pytest.raises(InvalidCombination, match=why):
            with_power(get(solver), power).init(C, rule)
        return
    options = ROWS[solver][0] | ({"power": power} if power != 1 else {})
    made = get(solver)(**options)
    assert made.takes(C) and made.power == power
    state = made.init(C, rule)
    expected = power_of(rule(C, power).to_dense(), -power)
    P, _ = made.apply(state, eye(C.n), C)
    assert_close(P, expected, **EXACT)
    if damping != "none" and structure != "matrix_free":  # negative: the damping is there
        with pytest.raises(AssertionError):
            assert_close(P, power_of(C.to_dense(), -power), **EXACT)


def taken() -> list[Any]:
    cells = [(s, c) for s in ROWS for c in STRUCTURES if c in ROWS[s][1] and (s, c) != ("eigen", "kronecker_sum")]
    return [pytest.param(s, c, id=f"{s}-{c}") for s, c in cells]


def prepared(solver: str, structure: str, value: float = 0.1) -> tuple[Solver, Operator, dict[str, Any], Tensor]:
    """Solver, operator, state, and the damped matrix, with the damping natural to the cell."""
    made, C = get(solver)(**ROWS[solver][0]), STRUCTURES[structure]()
    rule = made.natural_damping(type(C))(value)
    return made, C, made.init(C, rule), rule(C).to_dense()


@pytest.mark.parametrize(("solver", "structure"), taken())
def test_undoes_the_damped_product(solver: str, structure: str) -> None:
    made, C, state, M = prepared(solver, structure)
    v = draw(C.n, seed=4)
    assert_close(made.apply(state, M @ v, C)[0], v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "structure"), taken())
def test_is_linear_symmetric_and_positive_and_columns_equal_vectors(solver: str, structure: str) -> None:
    made, C, state, _ = prepared(solver, structure)
    V = draw(C.n, 3, seed=4)

    def P(v: Tensor) -> Tensor:
        return made.apply(state, v, C)[0]

    assert_close(P(V), torch.stack([P(v) for v in V.T], 1), **EXACT)
    assert_close(P(2 * V[:, 0] - V[:, 1]), 2 * P(V[:, 0]) - P(V[:, 1]), **EXACT)
    assert_close(V[:, 0] @ P(V[:, 1]), V[:, 1] @ P(V[:, 0]), **EXACT)
    assert (V * P(V)).sum(0).min() > 0
    assert_close(P(torch.zeros(C.n, dtype=torch.float64)), torch.zeros(C.n, dtype=torch.float64), rtol=0, atol=0)
    with pytest.raises(ValueError, match="takes a vector"):
        P(V[None])


@pytest.mark.parametrize(("solver", "structure"), taken())
def test_state_is_read_with_weights_only_and_apply_leaves_it_as_it_is(solver: str, structure: str) -> None:
    made, C, state, _ = prepared(solver, structure)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    v = draw(C.n)
    before = set(state)
    result, _ = made.apply(state, v, C)
    assert set(state) == before
    assert_close(made.apply(loaded, v, C)[0], result, rtol=0, atol=0)
    if solver not in FOLLOWS:
        assert_close(made.apply(made.refresh(state, C, made.natural_damping(type(C))(0.1)), v, C)[0], result, rtol=0, atol=0)


def to_meta(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: to_meta(value) for key, value in state.items()}
    return state.to("meta") if isinstance(state, Tensor) else state


@pytest.mark.parametrize(("solver", "structure"), [p for p in taken() if p.values[0] in DIRECT])
def test_applying_never_waits_for_the_device(solver: str, structure: str) -> None:
    made, C, state, _ = prepared(solver, structure)
    v = torch.empty(C.n, dtype=torch.float64, device="meta")  # reading a meta tensor on the host raises
    assert made.apply(to_meta(state), v)[0].shape == (C.n,)


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
    C = {"elementwise": Diagonal(nan[0]), "smw": LowRank(nan)}.get(solver, Dense(nan))
    with pytest.raises(SolverFailure):
        create(solver).init(C, Tikhonov(0.1))


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


@pytest.mark.parametrize("structure", ["dense", "kronecker", "kronecker_stack", "diagonal", "kronecker_eigen"])
def test_identity_26_powers(structure: str) -> None:
    C, g = STRUCTURES[structure](), draw(STRUCTURES[structure]().n)
    half, quarter, one = (inverse(C, solver="eigen", damping=0.1, power=p) for p in (0.5, 0.25, 1.0))
    assert_close(half @ (half @ g), one @ g, **EXACT)
    assert_close(quarter @ (quarter @ g), half @ g, **EXACT)
    outside = inverse(C, solver="eigen", damping=Outside(0.1), power=0.5)
    with pytest.raises(AssertionError):  # negative: outside the power it is another matrix
        assert_close(outside @ g, half @ g, **EXACT)


def test_shampoo_is_the_quarter_power_of_each_of_two_factors() -> None:
    L, R, G = conditioned(3, seed=1), conditioned(2, seed=2), draw(3, 2)
    P = inverse(Kronecker(L, R, exponent=0.5), solver="eigen", power=0.5)
    assert_close(P @ G.flatten(), (power_of(L, -0.25) @ G @ power_of(R, -0.25)).flatten(), **EXACT)


def test_natural_damping_is_exact_wherever_it_can_be() -> None:
    for name in names():
        factored = name in ("cholesky", "lu", "bfgs", "smw")
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
    with pytest.raises(InvalidCombination, match="solvers with a power are eigen, elementwise, smw"):
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
    others = {"elementwise": Diagonal(torch.ones(3)), "smw": LowRank(torch.eye(3)[:2]), "sparse_cholesky": network(torch.eye(3), [[-1], [0], [0]])}
    C = others.get(solver, Kronecker(torch.eye(2), torch.eye(3), scale=scale))
    out, _ = made.apply(made.init(C, made.natural_damping(type(C))(torch.tensor(0.1, dtype=torch.float64))), torch.ones(C.n))
    assert out.dtype == torch.float32
