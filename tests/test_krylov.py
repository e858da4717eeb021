"""Claims about the `krylov` solver, beside those of the grid in `test_solvers.py`.

- spectrum="abs" applies (|C| + l I)^-p of an indefinite C, live or not, with products of C alone, also where C is |C| already.
- "minres" has the least residual of its Krylov space, and takes an operator whose projection is singular, where "lanczos" says so.
- k steps of "lanczos" are k iterations of CG on a definite operator; with the last direction in the basis it is KSD's subspace minimiser.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.damping import Tikhonov
from precond.errors import SolverFailure
from precond.inversion import inverse
from precond.operators import Absolute, Dense, MatrixFree
from precond.solvers import CG, Krylov
from solver_grid import EXACT, basis, conditioned, draw, eye

INDEFINITE = (basis(6) * torch.tensor([2.0, -1.5, 0.7, -0.3, 0.1, -4.0], dtype=torch.float64)) @ basis(6).T


class Counted:
    def __init__(self, A: Tensor) -> None:
        self.A, self.products = A, 0

    def operator(self) -> MatrixFree:
        return MatrixFree(self, len(self.A), self.A.dtype, "cpu")

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.A @ v


def absolute(A: Tensor, damping: float, p: float) -> Tensor:
    d, U = torch.linalg.eigh(A)
    return (U * (d.abs() + damping) ** -p) @ U.T


def krylov_basis(A: Tensor, b: Tensor, steps: int, *more: Tensor) -> Tensor:
    columns = [torch.linalg.matrix_power(A, k) @ b for k in range(steps)]
    return torch.linalg.qr(torch.stack([*columns, *more], 1))[0]


@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("live", [False, True])
def test_abs_is_the_power_of_the_damped_absolute_value(power: float, live: bool) -> None:
    C = Counted(INDEFINITE).operator() if live else Dense(INDEFINITE)
    P = inverse(C, solver=Krylov(power=power, spectrum="abs"), damping=0.1)
    assert_close(P.to_dense(), absolute(INDEFINITE, 0.1, power), **EXACT)
    assert_close(P.damped.to_dense(), absolute(INDEFINITE, 0.1, -1.0), **EXACT)
    if power == 1:  # negative: as it is, it is another matrix
        with pytest.raises(AssertionError):
            assert_close(inverse(C, solver=Krylov(), damping=0.1).to_dense(), P.to_dense(), **EXACT)
    else:
        with pytest.raises(SolverFailure, match="abs"):
            inverse(C, solver=Krylov(power=power), damping=0.1) @ draw(6)


def test_an_absolute_value_is_never_formed() -> None:
    counted, b = Counted(INDEFINITE), draw(6)
    C, solver = Absolute(counted.operator()), Krylov(spectrum="abs")
    x, state = solver.apply(solver.init(C, Tikhonov(0.1)), b, C)
    assert_close(x, absolute(INDEFINITE, 0.1, 1.0) @ b, **EXACT)
    assert counted.products == 6 == state["iterations"]
    assert_close(C @ b, absolute(INDEFINITE, 0.0, -1.0) @ b, **EXACT)
    assert counted.products == 12


def test_minres_has_the_least_residual_of_its_space() -> None:
    b = draw(6)
    for k in (1, 3, 5):
        solver = Krylov(method="minres", steps=k)
        x, _ = solver.apply(solver.init(Dense(INDEFINITE), Tikhonov(0.2)), b)
        V, M = krylov_basis(INDEFINITE, b, k), INDEFINITE + 0.2 * eye(6)
        assert_close(x, V @ torch.linalg.lstsq(M @ V, b.unsqueeze(1)).solution[:, 0], **EXACT)
    full = Krylov(method="minres")
    assert_close(full.apply(full.init(Dense(INDEFINITE), Tikhonov(0.2)), b)[0], torch.linalg.solve(M, b), **EXACT)


def test_minres_takes_an_operator_whose_projection_is_singular() -> None:
    C, b = Dense(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))), torch.ones(2).double()
    for method, steps in (("minres", 1), ("minres", 2), ("lanczos", 2)):
        solver = Krylov(method=method, steps=steps)  # type: ignore[arg-type]
        x, _ = solver.apply(solver.init(C, Tikhonov(0.0)), b)
        assert_close(x, torch.zeros(2).double() if steps == 1 else torch.tensor([1.0, -1.0]).double(), **EXACT)
    solver = Krylov(steps=1)
    with pytest.raises(SolverFailure, match="singular"):
        solver.apply(solver.init(C, Tikhonov(0.0)), b)


def test_its_steps_on_a_definite_operator_are_those_of_cg() -> None:
    C, b = Dense(conditioned(8)), draw(8)
    for k in (1, 3, 5):
        krylov, cg = Krylov(steps=k), CG(max_iterations=k)
        x, _ = krylov.apply(krylov.init(C, Tikhonov(0.1)), b)
        assert_close(x, cg.apply(cg.init(C, Tikhonov(0.1)), b)[0], **EXACT)
        assert (x - torch.linalg.solve(C.matrix + 0.1 * eye(8), b)).norm() > 1e-6  # negative: it is not the solution yet


def test_ksd_minimises_over_its_space_and_the_last_direction() -> None:
    A, A_next, b, b_next = conditioned(8), conditioned(8, seed=5), draw(8), draw(8, seed=3)
    solver = Krylov(steps=3, previous_direction=True)
    first, state = solver.apply(solver.init(Dense(A), Tikhonov(0.1)), b)
    V = krylov_basis(A, b, 3)
    assert_close(first, V @ torch.linalg.solve(V.T @ A @ V + 0.1 * eye(3), V.T @ b), **EXACT)
    second, state = solver.apply(solver.refresh(state, Dense(A_next), Tikhonov(0.1)), b_next)
    V = krylov_basis(A_next, b_next, 3, first)
    assert_close(second, V @ torch.linalg.solve(V.T @ A_next @ V + 0.1 * eye(4), V.T @ b_next), **EXACT)
    plain = Krylov(steps=3)
    with pytest.raises(AssertionError):  # negative: the last direction matters
        assert_close(second, plain.apply(plain.init(Dense(A_next), Tikhonov(0.1)), b_next)[0], **EXACT)
    again, _ = solver.apply(solver.refresh(state | {"x": b_next.unsqueeze(1)}, Dense(A_next), Tikhonov(0.1)), b_next)
    assert_close(
        again, plain.apply(plain.init(Dense(A_next), Tikhonov(0.1)), b_next)[0], **EXACT
    )  # one that lies in the space adds nothing


@pytest.mark.parametrize("method", ["lanczos", "minres"])
def test_a_tolerance_ends_earlier(method: str) -> None:
    A, b = conditioned(30, 5.0), draw(30)
    loose, full = (Krylov(method=method, steps=30, tolerance=t) for t in (1e-3, 0.0))  # type: ignore[arg-type]
    x, state = loose.apply(loose.init(Dense(A), Tikhonov(0.0)), b)
    _, complete = full.apply(full.init(Dense(A), Tikhonov(0.0)), b)
    assert 3 < state["iterations"] < complete["iterations"] == 30
    assert 1e-8 < (b - A @ x).norm() / b.norm() < 1e-2


def test_options_are_checked_when_made() -> None:
    for options, message in (
        ({"power": 0.0}, "positive"), ({"steps": 0}, "steps"), ({"method": "gmres"}, "minres"), ({"spectrum": "clamp"}, "abs"),
        ({"method": "minres", "power": 0.5}, "linear system"), ({"method": "minres", "previous_direction": True}, "linear system"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Krylov(**options)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize(("scale", "size"), [(2.0**-83, 1.0), (2.0**83, 1.0), (1.0, 2.0**-90), (1.0, 2.0**90)])
def test_it_is_exact_where_squares_leave_the_range_of_float32(scale: float, size: float, power: float) -> None:
    A, b = conditioned(6).float(), draw(6).float()
    solver = Krylov(power=power)
    want, _ = solver.apply(solver.init(Dense(A), Tikhonov(0.1)), b)
    assert float(torch.tensor(scale * size).square()) in (0.0, math.inf)  # control: the squares are lost
    x, state = solver.apply(solver.init(Dense(scale * A), Tikhonov(0.1 * scale)), size * b)
    assert state["iterations"] == 6
    assert_close(x * scale**power / size, want, rtol=1e-5, atol=1e-6)  # rounding of float32: sqrt(scale) is no power of two
