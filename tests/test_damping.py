"""Claims about damping:

- Tikhonov is C + value I for every structure, Outside is (C^p + value I)^(1/p), Factored is the pi-corrected formula of K-FAC, for any
  number of factors, any scale and exponent, and per product of a stack;
- Factored damping of a power is what every solver of Kronecker operators inverts, to the powers 1, 1/2, 1/4 and 1/6;
- Factored exceeds C + value I by a semi-definite matrix (identity 23), does not see A -> c A, B -> B / c, equals C at value 0, and takes
  pi = 1 where a trace is zero;
- structures are kept, so that solvers can use them; a boost raises the value; bad values and cells are refused with a sentence;
- nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Factored, Outside, Tikhonov, resolve
from precond.errors import InvalidCombination
from precond.inversion import inverse
from precond.operators import BlockDiagonal, Dense, Diagonal, Kronecker, KroneckerEigen, MatrixFree, Operator, RootShifted, Shifted
from precond.solvers import get

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(*shape: int, seed: int = 0) -> Tensor:
    X = draw(*shape, shape[-1], seed=seed)
    return X @ X.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=X.dtype)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def root(A: Tensor, p: float) -> Tensor:
    d, U = torch.linalg.eigh(A)
    return U @ torch.diag(d**p) @ U.T


A, B = definite(3, seed=1), definite(2, seed=2)
OPERATORS: dict[str, Operator] = {
    "dense": Dense(A),
    "stack": Dense(definite(2, 3)),
    "diagonal": Diagonal(A.diagonal()),
    "kronecker": Kronecker(B, A, scale=0.3),
    "power": Kronecker(B, A.diagonal(), exponent=0.5),
    "kronecker_eigen": KroneckerEigen((torch.linalg.qr(draw(3, 3))[0],), A.diagonal()),
    "shifted": Shifted(Kronecker(B, A), 0.1),
    "matrix_free": MatrixFree(lambda v: A @ v, 3, torch.float64, "cpu"),
    "blocks": BlockDiagonal({"a": Dense(A), "b": Kronecker(B, B)}),
}
every = pytest.mark.parametrize("C", OPERATORS.values(), ids=OPERATORS.keys())


@every
@pytest.mark.parametrize("value", [0.0, 0.2, torch.tensor(0.2, dtype=torch.float64)], ids=["zero", "float", "tensor"])
def test_tikhonov_adds_a_multiple_of_the_identity(C: Operator, value: float | Tensor) -> None:
    assert_close(Tikhonov(value)(C).to_dense(), C.to_dense() + value * eye(C.n), **EXACT)
    # inside the power: the power does not matter
    assert_close(Tikhonov(value)(C, 0.5).to_dense(), C.to_dense() + value * eye(C.n), **EXACT)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "matrix_free"])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_outside_is_added_to_the_power(name: str, power: float) -> None:
    C = OPERATORS[name]
    M = root(root(C.to_dense(), power) + 0.2 * eye(C.n), 1 / power)
    assert_close(Outside(0.2)(C, power).to_dense(), M, **EXACT)
    assert_close(Outside(0.0)(C, power).to_dense(), C.to_dense(), **EXACT)
    if power != 1:
        with pytest.raises(AssertionError):  # negative: not what is added inside
            assert_close(Tikhonov(0.2)(C, power).to_dense(), M, **EXACT)


def test_structures_are_kept() -> None:
    kinds = {name: type(Tikhonov(0.1)(C)) for name, C in OPERATORS.items()}
    assert kinds["dense"] is kinds["stack"] is Dense and kinds["diagonal"] is Diagonal and kinds["blocks"] is BlockDiagonal
    assert all(kinds[name] is Shifted for name in ("kronecker", "power", "kronecker_eigen", "shifted", "matrix_free"))
    shifted = Tikhonov(0.1)(OPERATORS["shifted"])
    assert isinstance(shifted, Shifted) and isinstance(shifted.operator, Kronecker), "one shift, not two"
    assert Tikhonov(0.0)(OPERATORS["kronecker"]) is OPERATORS["kronecker"]
    assert isinstance(Outside(0.1)(OPERATORS["kronecker"], 0.5), RootShifted)
    damped = Factored(0.1)(Kronecker(B, A.diagonal()))
    assert isinstance(damped, Kronecker) and [type(F) for F in damped.factors] == [Dense, Diagonal]


@pytest.mark.parametrize("value", [0.07, torch.tensor(0.07, dtype=torch.float64)])
def test_factored_is_the_formula_of_kfac(value: float | Tensor) -> None:
    pi = ((A.trace() / 3) / (B.trace() / 2)).sqrt()
    expected = torch.kron(B + value**0.5 / pi * eye(2), A + pi * value**0.5 * eye(3))
    assert_close(Factored(value)(Kronecker(B, A)).to_dense(), expected, **EXACT)
    plain = torch.kron(B + value**0.5 * eye(2), A + value**0.5 * eye(3))
    assert_close(Factored(value, pi=False)(Kronecker(B, A)).to_dense(), plain, **EXACT)
    with pytest.raises(AssertionError):  # negative: pi matters
        assert_close(expected, plain, **EXACT)


def test_factored_with_three_factors_a_scale_and_an_exponent() -> None:
    d, scale, value, e = draw(2, seed=5).abs() + 0.1, 0.3, 0.07, 0.25
    raised = [root(B, e), root(A, e), torch.diag(d**e)]
    w = [F.trace() / len(F) for F in raised]
    c = (w[0] * w[1] * w[2]) ** (1 / 3)
    damped = [F + (value / scale) ** (1 / 3) * wm / c * eye(len(F)) for F, wm in zip(raised, w, strict=True)]
    expected = scale * torch.kron(torch.kron(damped[0], damped[1]), damped[2])
    assert_close(Factored(value)(Kronecker(B, A, d, exponent=e, scale=scale)).to_dense(), expected, **EXACT)
    tensor_scale = torch.tensor(scale, dtype=torch.float64)
    assert_close(Factored(value)(Kronecker(B, A, d, exponent=e, scale=tensor_scale)).to_dense(), expected, **EXACT)


def factored_by_hand(factors: list[Tensor], e: float, value: float) -> Tensor:
    """The formula on F_m^e, each by an eigendecomposition."""
    raised = [root(F, e) for F in factors]
    w = torch.stack([F.trace() / len(F) for F in raised])
    shifts = value ** (1 / len(w)) * w / w.log().mean().exp()
    return functools.reduce(torch.kron, [F + shift * eye(len(F)) for F, shift in zip(raised, shifts, strict=True)])


FACTORS = [B, A, definite(2, seed=7)]
POWERED = [("cholesky", 1), ("lu", 1), ("smw", 1), ("bfgs", 1), *((s, p) for s in ("eigen", "newton_schulz", "qr_iteration") for p in (1, 2, 4, 6))]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("inside", [1.0, 0.5, "1/k"])
@pytest.mark.parametrize(("solver", "root_of"), POWERED, ids=str)
def test_factored_damping_of_a_power_is_what_every_kronecker_solver_inverts(solver: str, root_of: int, inside: Any, k: int) -> None:
    """Shampoo's (F_1^e (x) ... (x) F_k^e + ...)^(-1/(2k)) and its like: the exponent before the damping, the power after it."""
    e, p, factors = (1 / k if inside == "1/k" else inside), 1 / root_of, FACTORS[:k]
    expected = factored_by_hand(factors, e, 0.07)
    C = Kronecker(*factors, exponent=e)
    P = inverse(C, solver=solver, damping=Factored(0.07), power=p)
    assert_close(P.damped.to_dense(), expected, **EXACT)
    options = {"tolerance": 1e-13} if solver == "newton_schulz" else {}
    made = get(solver)(**options, **({"power": p} if p != 1 else {}))  # type: ignore[arg-type]
    assert_close(inverse(C, solver=made, damping=Factored(0.07)).to_dense(), root(expected, -p), rtol=1e-10, atol=1e-10)
    if k > 1:
        with pytest.raises(AssertionError):  # negative: it is not C + value I
            assert_close(expected, C.to_dense() + 0.07 * eye(C.n), rtol=1e-3, atol=1e-3)
    if e != 1:
        with pytest.raises(AssertionError):  # negative: damped before the exponent it is another matrix
            assert_close(expected, root(factored_by_hand(factors, 1.0, 0.07), e), rtol=1e-3, atol=1e-3)


def test_factored_balances_each_product_of_a_stack() -> None:
    Bs, As = definite(2, 2, seed=1) * torch.tensor([1.0, 100.0], dtype=torch.float64)[:, None, None], definite(2, 3, seed=2)
    expected = [Factored(0.1)(Kronecker(Bs[i], As[i])).to_dense() for i in range(2)]
    assert_close(Factored(0.1)(Kronecker(Bs, As)).to_dense(), torch.block_diag(*expected), **EXACT)


def test_factored_exceeds_tikhonov_and_does_not_see_the_balance_of_the_factors() -> None:
    C, value = Kronecker(B, A), 0.05
    damped = Factored(value)(C).to_dense()
    gap = torch.linalg.eigvalsh(damped - C.to_dense() - value * eye(6))
    assert gap.min() > -1e-12 and gap.max() > 1e-3  # semi-definite, and not zero
    assert_close(Factored(value)(Kronecker(B / 1e3, A * 1e3)).to_dense(), damped, **EXACT)
    with pytest.raises(AssertionError):  # negative: without pi the balance shows
        assert_close(Factored(value, pi=False)(Kronecker(B / 1e3, A * 1e3)).to_dense(), Factored(value, pi=False)(C).to_dense(), **EXACT)
    assert_close(Factored(0.0)(C).to_dense(), C.to_dense(), **EXACT)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, dtype=torch.float64), torch.full((2, 2), torch.nan, dtype=torch.float64), -eye(2)])
def test_factored_takes_pi_one_where_a_trace_is_not_positive(bad: Tensor) -> None:
    damped = Factored(0.04)(Kronecker(bad, A))
    assert isinstance(damped, Kronecker)
    assert_close(damped.factors[1].to_dense(), A + 0.2 * eye(3), **EXACT)
    assert_close(damped.factors[0].to_dense(), bad + 0.2 * eye(2), equal_nan=True, **EXACT)


def test_factored_equals_tikhonov_without_factors_and_is_refused_elsewhere() -> None:
    for name in ("dense", "stack", "diagonal"):
        assert_close(Factored(0.1)(OPERATORS[name]).to_dense(), Tikhonov(0.1)(OPERATORS[name]).to_dense(), **EXACT)
    for name in ("kronecker_eigen", "matrix_free", "shifted"):
        with pytest.raises(InvalidCombination, match="use Tikhonov"):
            Factored(0.1)(OPERATORS[name])
    with pytest.raises(InvalidCombination, match="use Tikhonov"):
        Outside(0.1)(OPERATORS["matrix_free"], 0.5)


def test_nothing_waits_for_the_device() -> None:
    value = torch.empty((), device="meta")  # reading a meta tensor on the host raises
    C = Kronecker(torch.empty(2, 3, 3, device="meta"), torch.empty(2, 2, 2, device="meta"), scale=value)
    for rule in (Tikhonov(value), Outside(value), Factored(value), Factored(0.1)):
        assert rule(C, 1.0).shape == (12, 12)
    with pytest.raises((RuntimeError, NotImplementedError)):  # negative
        bool(value > 0)


def test_a_boost_multiplies_and_starts_at_the_scale_of_the_operator() -> None:
    C = Diagonal(torch.tensor([1.0, 3.0]))
    assert Tikhonov(0.5).boosted(10.0, C) == Tikhonov(5.0)
    assert Factored(0.5, pi=False).boosted(10.0, C) == Factored(5.0, pi=False)
    assert_close(torch.as_tensor(Outside(0.0).boosted(10.0, C).value), torch.tensor(2e-8))
    live = MatrixFree(lambda v: 3 * v, 4, torch.float32, "cpu")
    assert_close(torch.as_tensor(Tikhonov(0.0).boosted(10.0, live).value), torch.tensor(3e-8))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), torch.tensor(-1.0), torch.ones(2)])
@pytest.mark.parametrize("kind", [Tikhonov, Outside, Factored])
def test_values_that_cannot_damp_are_refused(kind: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(ValueError, match="damping"):
        kind(value)


def test_resolve() -> None:
    assert resolve(1e-3, Factored) == Factored(1e-3) and resolve(0, Tikhonov) == Tikhonov(0)
    assert resolve(Outside(1.0), Tikhonov) == Outside(1.0)
    for wrong in ("1e-3", True, None):
        with pytest.raises(TypeError, match="number or an object"):
            resolve(wrong, Tikhonov)  # type: ignore[arg-type]
