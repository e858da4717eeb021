"""Claims about the further damping objects and about which cells take them:

- `PerFactor` is (F_m + value I)^e in every factor, before the exponent; `Relative` is its value in units of the mean or the largest
  eigenvalue, in any form; `Floor` clamps or shifts eigenvalues, of the whole or factor by factor: each equal to the dense formula, structures kept;
- the damped dense matrix is what every solver inverts, to any power it has, or the solver refuses the structure with the reason (all solvers
  x all dampings x structures are tried: none gives a wrong answer);
- a value may be a function of the step; `weight_decay=True` adds the optimizer's; both act in training as dense algebra says; an override has
  its own damping;
- a fallback and repr="auto" keep the amount and the schedule in the form natural to the new cell; wrong options are refused.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from precond import Preconditioner, cells, inverse, solvers
from precond.damping import Blockwise, Damping, Factored, Floor, LevenbergMarquardt, Outside, PerFactor, Relative, Tikhonov, resolve
from precond.errors import InvalidCombination, SolverFailure, UsageError
from precond.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    LowRank,
    MatrixFree,
    Operator,
    Shifted,
)
from training import EXACT, LR, batches, differ, fit, gradient, make, move, net, of, plain, same, sgd, solve


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(*shape: int, seed: int = 0) -> Tensor:
    X = draw(*shape, shape[-1], seed=seed)
    return X @ X.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=X.dtype)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def by_eigenvalues(A: Tensor, f: Any) -> Tensor:
    d, U = torch.linalg.eigh(A)
    return U @ torch.diag(f(d)) @ U.T


def root(A: Tensor, p: float) -> Tensor:
    return by_eigenvalues(A, lambda d: d**p)


A, B = definite(3, seed=1), definite(2, seed=2)
INDEFINITE = A - 0.8 * eye(3)
assert torch.linalg.eigvalsh(INDEFINITE)[0] < -0.1
STRUCTURES: dict[str, Operator] = {
    "dense": Dense(A),
    "stack": Dense(definite(2, 3)),
    "diagonal": Diagonal(A.diagonal()),
    "kronecker": Kronecker(B, A, scale=0.3),
    "power": Kronecker(B, A.diagonal(), exponent=0.5),
    "kronecker_eigen": KroneckerEigen((torch.linalg.qr(draw(3, 3))[0],), A.diagonal()),
    "kronecker_sum": KroneckerSum(B, A),
    "low_rank": LowRank(draw(2, 4)),
    "shifted": Shifted(Kronecker(B, A), 0.1),
    "matrix_free": MatrixFree(lambda v: A @ v, 3, torch.float64, "cpu"),
    "blocks": BlockDiagonal({"a": Dense(A), "b": Kronecker(B, B)}),
}
DAMPINGS: dict[str, Damping] = {
    "Tikhonov": Tikhonov(0.2), "Outside": Outside(0.2), "Factored": Factored(0.2), "PerFactor": PerFactor(0.2), "Blockwise": Blockwise(0.2),
    "Relative": Relative(0.2), "largest": Relative(0.2, of="largest"), "relative_factored": Relative(0.2, form="Factored"),
    "balanced": PerFactor(0.2, balanced=True),
    "Floor": Floor(0.4), "shift": Floor(0.4, policy="shift"), "floor_factors": Floor(0.4, factors=True),
    "LevenbergMarquardt": LevenbergMarquardt(0.2), "tensor": Floor(torch.tensor(0.4, dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("value", [0.07, torch.tensor(0.07, dtype=torch.float64)], ids=["float", "tensor"])
def test_per_factor_is_added_to_each_factor_before_the_exponent(value: Any) -> None:
    d = A.diagonal()
    damped = PerFactor(value)(Kronecker(B, A, d, exponent=0.25, scale=0.3))
    assert isinstance(damped, Kronecker) and damped.exponent == 0.25
    parts = [root(B + value * eye(2), 0.25), root(A + value * eye(3), 0.25), torch.diag((d + value) ** 0.25)]
    assert_close(damped.to_dense(), 0.3 * torch.kron(torch.kron(parts[0], parts[1]), parts[2]), **EXACT)
    differ(damped.to_dense(), Tikhonov(value)(Kronecker(B, A, d, exponent=0.25, scale=0.3)).to_dense())
    added = PerFactor(value)(KroneckerSum(B, A))
    assert_close(added.to_dense(), torch.kron(B + value * eye(2), eye(3)) + torch.kron(eye(2), A + value * eye(3)), **EXACT)
    terms = PerFactor(value)(KroneckerSum(Kronecker(B, A), Kronecker(B, A)))
    assert_close(terms.to_dense(), 2 * torch.kron(B + value * eye(2), A + value * eye(3)), **EXACT)


def test_per_factor_of_some_factors_leaves_the_others() -> None:
    C = Kronecker(B, A)
    second = torch.kron(B, A + 0.3 * eye(3))
    for only in ((1,), (-1,), (1, 5)):
        assert_close(PerFactor(0.3, only=only)(C).to_dense(), second, **EXACT)
    assert_close(PerFactor(0.3, only=(0, 1))(C).to_dense(), PerFactor(0.3)(C).to_dense(), **EXACT)
    differ(PerFactor(0.3)(C).to_dense(), second)
    assert_close(PerFactor(0.3, only=(0,))(KroneckerSum(B, A)).to_dense(), torch.kron(B + 0.3 * eye(2), eye(3)) + torch.kron(eye(2), A), **EXACT)
    terms = KroneckerSum(Kronecker(B, A), Kronecker(B, A))
    assert_close(PerFactor(0.3, only=(1,))(terms).to_dense(), 2 * second, **EXACT)
    for wrong in ((), (True,), (0.5,)):
        with pytest.raises(ValueError, match=r"such as \[1\]"):
            PerFactor(0.3, only=wrong)  # type: ignore[arg-type]


def test_per_factor_sees_the_balance_of_the_factors() -> None:
    """Negative control: what `Factored` is there for."""
    differ(PerFactor(0.1)(Kronecker(B / 10, A * 10)).to_dense(), PerFactor(0.1)(Kronecker(B, A)).to_dense())


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n not in ("matrix_free", "blocks")])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_relative_is_in_units_of_the_operator(name: str, scale: float) -> None:
    C = STRUCTURES[name]
    M = scale * C.to_dense()
    scaled = Kronecker(*C.factors, exponent=C.exponent, scale=scale * C.scale) if isinstance(C, Kronecker) else Dense(M)
    assert_close(Relative(0.2)(scaled).to_dense(), M + 0.2 * M.trace() / len(M) * eye(len(M)), rtol=1e-10, atol=1e-16)
    assert_close(
        Relative(0.2, of="largest")(scaled).to_dense(), M + 0.2 * torch.linalg.eigvalsh(M)[-1] * eye(len(M)), rtol=1e-10, atol=1e-16
    )
    assert_close(Relative(0.2)(C).to_dense(), C.to_dense() + 0.2 * C.to_dense().trace() / C.n * eye(C.n), **EXACT)


def test_relative_takes_any_form_each_block_its_own_unit_and_one_for_a_dead_layer() -> None:
    C = Kronecker(B, A)
    unit = float(C.trace() / 6)
    assert_close(Relative(0.2, form="Factored")(C).to_dense(), Factored(0.2 * unit)(C).to_dense(), **EXACT)
    assert_close(Relative(0.2, form="Outside")(C, 0.5).to_dense(), Outside(0.2 * unit)(C, 0.5).to_dense(), **EXACT)
    blocks = Relative(0.2)(BlockDiagonal({"a": Dense(A), "b": Dense(100 * A)})).to_dense()
    assert_close(blocks[3:, 3:], 100 * blocks[:3, :3], **EXACT)
    assert_close(Relative(0.2)(Dense(torch.zeros(2, 2))).to_dense(), 0.2 * torch.eye(2))
    with pytest.raises(InvalidCombination, match="no Relative damping"):
        Relative(0.2)(STRUCTURES["matrix_free"])


@pytest.mark.parametrize("value", [0.4, torch.tensor(0.4, dtype=torch.float64)], ids=["float", "tensor"])
def test_floor_raises_the_spectrum(value: Any) -> None:
    def shifted(d: Tensor) -> Tensor:
        return d - d.min().clamp(max=0) + value

    for M in (A, INDEFINITE):
        assert_close(Floor(value)(Dense(M)).to_dense(), by_eigenvalues(M, lambda d: d.clamp(min=float(value))), **EXACT)
        assert_close(Floor(value, policy="shift")(Dense(M)).to_dense(), by_eigenvalues(M, shifted), **EXACT)
    assert_close(Floor(value, policy="shift")(Dense(A)).to_dense(), A + value * eye(3), **EXACT)
    C, M = Kronecker(B, INDEFINITE), torch.kron(B, INDEFINITE)
    assert_close(Floor(value)(C).to_dense(), by_eigenvalues(M, lambda d: d.clamp(min=float(value))), **EXACT)
    assert_close(Floor(value, policy="shift")(C).to_dense(), by_eigenvalues(M, shifted), **EXACT)
    factors = Floor(value, factors=True)(Kronecker(B, A, exponent=0.5))
    assert isinstance(factors, Kronecker)
    clamped = [root(by_eigenvalues(F, lambda d: d.clamp(min=float(value))), 0.5) for F in (B, A)]
    assert_close(factors.to_dense(), torch.kron(*clamped), **EXACT)
    U = draw(2, 4)
    for policy in ("clamp", "shift"):
        low = Floor(value, policy=policy)(LowRank(U)).to_dense()
        assert_close(low, by_eigenvalues(U.T @ U, (lambda d: d.clamp(min=float(value))) if policy == "clamp" else shifted), **EXACT)
    weighted = LowRank(U, weights=torch.tensor([1.0, -2.0], dtype=torch.float64))
    M = weighted.to_dense()
    assert_close(Floor(value, policy="shift")(weighted).to_dense(), by_eigenvalues(M, shifted), **EXACT)


def test_floor_of_a_stack_is_of_each_matrix() -> None:
    stack = torch.stack([A, INDEFINITE])
    for policy in ("clamp", "shift"):
        rule = Floor(0.4, policy=policy)
        assert_close(rule(Dense(stack)).to_dense(), torch.block_diag(*(rule(Dense(M)).to_dense() for M in stack)), **EXACT)
        kron = [rule(Kronecker(B, M)).to_dense() for M in stack]
        assert_close(rule(Kronecker(torch.stack([B, B]), stack)).to_dense(), torch.block_diag(*kron), **EXACT)


def test_structures_are_kept() -> None:
    assert isinstance(Floor(0.4)(Dense(A)), Dense) and isinstance(Floor(0.4)(Diagonal(A.diagonal())), Diagonal)
    assert isinstance(Floor(0.4, factors=True)(Kronecker(B, A)), Kronecker)
    with pytest.raises(InvalidCombination, match="needs Kronecker factors"):
        Floor(0.4, factors=True)(STRUCTURES["low_rank"])
    with pytest.raises(InvalidCombination, match="PerFactor damping needs Kronecker factors"):
        PerFactor(0.4)(STRUCTURES["low_rank"])


SOLVERS = ("cholesky", "lu", "eigen", "smw", "elementwise", "cg")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_what_a_solver_inverts_is_the_damped_matrix_or_it_refuses(solver: str, damping: str) -> None:
    powers = (1.0, 0.5) if solver in ("eigen", "elementwise", "smw") else (1.0,)
    for C, power in itertools.product(STRUCTURES.values(), powers):
        rule = DAMPINGS[damping]
        made = solvers.CG(tolerance=1e-14) if solver == "cg" else solver
        try:
            P = inverse(C, solver=made, damping=rule, power=power if len(powers) > 1 else None)
        except InvalidCombination as error:
            assert str(error).endswith(".") and len(str(error)) > 30
            continue
        assert_close(P.to_dense(), root(P.damped.to_dense(), -power), rtol=1e-9, atol=1e-9)
        if not isinstance(rule, (Relative, LevenbergMarquardt)):  # whose form is the cell's
            assert_close(P.damped.to_dense(), rule(C, power).to_dense(), **EXACT)


TAKEN = {
    "cholesky": {"dense", "stack"}, "lu": {"dense", "stack"}, "elementwise": {"diagonal", "kronecker_eigen"},
    "eigen": set(STRUCTURES) - {"matrix_free"}, "smw": {"low_rank"},
}  # fmt: skip


@pytest.mark.parametrize("solver", TAKEN)
@pytest.mark.parametrize("damping", ["Tikhonov", "Floor", "shift", "Relative"])
def test_nothing_that_follows_from_exactness_is_refused(solver: str, damping: str) -> None:
    """What keeps the eigenvectors is taken wherever the spectrum is known, and by the factorising solvers where the matrix is dense."""
    for name in TAKEN[solver]:
        inverse(STRUCTURES[name], solver=solver, damping=DAMPINGS[damping])


@pytest.mark.parametrize("damping", ["Factored", "PerFactor", "floor_factors"])
def test_factor_wise_dampings_keep_the_factorising_solvers(damping: str) -> None:
    C = Kronecker(B, A)
    expected = torch.linalg.inv(DAMPINGS[damping](C).to_dense())
    for solver in ("cholesky", "lu", "eigen"):
        assert_close(inverse(C, solver=solver, damping=DAMPINGS[damping]).to_dense(), expected, **EXACT)


def test_the_form_is_that_of_the_cell() -> None:
    C = Kronecker(B, A)
    for rule in (Relative(0.2), LevenbergMarquardt(0.2)):
        damped = inverse(C, solver="cholesky", damping=rule).damped
        assert isinstance(damped, Kronecker)
        assert isinstance(inverse(C, solver="eigen", damping=rule).damped, Shifted)
    for rule in (Tikhonov(0.2), Relative(0.2, form="Tikhonov"), Floor(0.2)):
        with pytest.raises(InvalidCombination, match="not factor-wise"):
            inverse(C, solver="cholesky", damping=rule)
        with pytest.raises(InvalidCombination, match="not factor-wise"):
            make(repr="kron_io", damping=rule)
    assert cells.why_not_damping(Kronecker, solvers.Cholesky(), PerFactor(0.1)) is None


def test_a_schedule_has_a_value_at_a_step() -> None:
    rule = Factored(lambda step: 0.5**step, pi=False)
    assert rule.at(3) == Factored(0.125, pi=False) and rule.at(0).amount == 1.0
    with pytest.raises(UsageError, match=r"take it at one with damping\.at\(step\)"):
        rule(Kronecker(B, A))
    with pytest.raises(ValueError, match="finite and at least 0"):
        Tikhonov(lambda step: -1.0).at(2)
    assert resolve(lambda step: 2.0 * step, Tikhonov).at(2) == Tikhonov(4.0)
    assert Tikhonov(0.1).at(5, decay=0.3) == Tikhonov(0.1)
    assert Tikhonov(0.1, weight_decay=True).at(5, decay=0.3).amount == pytest.approx(0.4)
    assert Relative(lambda step: 0.1).at(1) == Relative(0.1)
    assert LevenbergMarquardt(0.1, weight_decay=True).at(0, 0.3, {"value": 0.2}) == Tikhonov(0.5)


@pytest.mark.parametrize("wrap", [lambda f: f, Tikhonov, lambda f: Relative(f, form="Tikhonov")], ids=["function", "Tikhonov", "Relative"])
def test_a_schedule_in_training(wrap: Any) -> None:
    preconditioner = make(damping=wrap(lambda step: 0.1 * 2**step))
    ours, expected = fit(preconditioner), net()
    relative = isinstance(preconditioner.triple.damping, Relative)
    for step, (x, y) in enumerate(batches(3)):
        C = of("ggn")(expected, x, y)
        unit = float(C.trace()) / len(C) if relative else 1.0
        move(expected, -LR * solve(C, 0.1 * 2**step * unit, gradient(expected, x, y)))
    same(ours, expected)
    assert "0.4" in str(preconditioner.describe()) or relative


def test_the_weight_decay_of_the_optimizer_enters_the_matrix_where_it_is_asked_for() -> None:
    def decaying(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.3)

    ours, without = fit(make(damping=Tikhonov(0.1, weight_decay=True)), optimizer=decaying), fit(make(damping=0.1), optimizer=decaying)
    expected = net()
    for x, y in batches(3):
        theta = torch.cat([p.detach().flatten() for p in expected.parameters()])
        move(expected, -LR * (solve(of("ggn")(expected, x, y), 0.4, gradient(expected, x, y)) + 0.3 * theta))
    same(ours, expected)
    differ(ours, without)


def test_an_override_has_its_own() -> None:
    preconditioner = make(repr="layer", damping=0.1, overrides={"2": {"damping": Floor(0.5)}})
    ours, expected = fit(preconditioner, steps=1), net()
    (x, y) = batches(1)[0]
    C, g = of("ggn")(expected, x, y), gradient(expected, x, y)
    last = by_eigenvalues(C[25:, 25:], lambda d: d.clamp(min=0.5))
    move(expected, -LR * torch.cat([solve(C[:25, :25], 0.1, g[:25]), torch.linalg.solve(last, g[25:])]))
    same(ours, expected)
    assert "Floor" in str(preconditioner.describe())


def test_a_fallback_takes_the_amount_in_its_own_form() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    preconditioner = Preconditioner(matrix="ggn", repr="kron_io", solver="cholesky", damping=LevenbergMarquardt(0.25), seed=0)
    criterion, optimizer = nn.CrossEntropyLoss(), sgd(model)
    with preconditioner.attach(model, criterion, optimizer):
        plain(model, criterion, optimizer, *batches(1)[0])
        rows = {row.parameter: row.damping for row in preconditioner.describe().rows}
    assert rows["0.weight"] == "Factored(value=0.25, pi=True)" and rows["1.weight"] == "Tikhonov(value=0.25)"


def test_what_another_cell_is_given() -> None:
    def schedule(step: int) -> float:
        return 0.5**step

    assert Factored(schedule).plain() is schedule and Floor(0.25, factors=True).plain() == 0.25
    assert Relative(0.25, form="Factored").plain() == Relative(0.25)
    assert resolve(LevenbergMarquardt(0.25, form="Factored", every=3).plain(), Tikhonov).at() == Tikhonov(0.25)


def test_boosts() -> None:
    C = Diagonal(torch.tensor([1.0, 3.0]))
    assert Relative(0.5).boosted(10.0, C) == Relative(5.0) and Relative(0.0).boosted(10.0, C) == Relative(1e-8)
    assert Floor(0.5, policy="shift").boosted(10.0, C) == Floor(5.0, policy="shift")
    assert PerFactor(0.5).boosted(10.0, C) == PerFactor(5.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Relative(0.1, of="median"), "choose one of 'mean', 'largest'"),
        (lambda: Relative(0.1, form="Relative"), "choose 'natural' or one of 'Tikhonov', 'Outside', 'Factored', 'PerFactor'"),
        (lambda: Floor(0.1, policy="pinv"), "choose one of 'clamp', 'shift'"),
        (lambda: Floor(-0.1), "at least 0"),
        (lambda: LevenbergMarquardt(1.0, factor=1.5), "lies in"),
        (lambda: LevenbergMarquardt(1.0, lower=2.0), "lower < upper"),
        (lambda: LevenbergMarquardt(1.0, every=0), "every >= 1"),
    ],
)
def test_options_are_checked_when_made(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_nothing_waits_for_the_device() -> None:
    value = torch.empty((), device="meta")
    C = Kronecker(torch.empty(2, 3, 3, device="meta"), torch.empty(2, 2, 2, device="meta"), scale=value)
    for rule in (PerFactor(value), Relative(value), Relative(0.1, form="Factored"), LevenbergMarquardt(1.0).shaped(value)):
        assert rule(C, 1.0).shape == (12, 12)


def test_a_zero_floor_of_a_singular_matrix_is_reported() -> None:
    with pytest.raises(SolverFailure):
        inverse(Dense(torch.zeros(2, 2)), solver="eigen", damping=Floor(0.0))
