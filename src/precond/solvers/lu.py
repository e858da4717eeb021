"""LU factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping
from precond.errors import SolverFailure
from precond.numerics import eigh, symmetrise
from precond.operators import Dense, Diagonal, Kronecker, Operator, Shifted
from precond.operators.base import number
from precond.operators.kronecker import matrices
from precond.solvers.base import REGISTRY, State
from precond.solvers.factors import Applied, FactorSolver

Spectrum = Literal["keep", "abs", "raise"]


@REGISTRY.register("lu")
@dataclass(frozen=True, kw_only=True)
class LU(FactorSolver):
    """C^-1 through a pivoted LU factorisation: dense and Kronecker operators that may be indefinite, as in Newton's method.

    Refresh 2 n^3 / 3 a matrix, apply 2 n^2. A stack is factorised at once.

    Args:
        spectrum: what becomes of negative eigenvalues. "keep": C is solved as it is, and a direction may go uphill; "abs": |C| in its place,
            damped afterwards, at the cost of an eigendecomposition (|B (x) A| = |B| (x) |A|); "raise": a damped matrix that is not
            definite fails, found by a Cholesky factorisation, so that more damping is tried.
        applied: "solve", "inverse", or "auto": the inverse is formed once a matrix has been applied to n columns since its refresh.

    Raises:
        SolverFailure: a pivot is within rounding of zero against the largest entry of its matrix; indefinite, and told to raise.

    >>> from precond.damping import Tikhonov
    >>> from precond.operators import Dense
    >>> C = Dense(torch.diag(torch.tensor([1.0, -2.0])))
    >>> LU().apply(LU().init(C, Tikhonov(0.0)), torch.ones(2))[0]
    tensor([ 1.0000, -0.5000])
    >>> LU(spectrum="abs").apply(LU(spectrum="abs").init(C, Tikhonov(0.0)), torch.ones(2))[0]
    tensor([1.0000, 0.5000])
    """

    break_even: ClassVar[float] = 1.0

    spectrum: Spectrum = "keep"
    applied: Applied = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spectrum not in get_args(Spectrum):
            raise ValueError(f"spectrum is one of {', '.join(get_args(Spectrum))}, not {self.spectrum!r}.")

    def damped(self, operator: Operator, damping: Damping) -> Operator:
        return super().damped(_absolute(operator) if self.spectrum == "abs" else operator, damping)

    def _factorise(self, A: Tensor) -> State:
        A = symmetrise(A)
        if self.spectrum == "raise" and bool((torch.linalg.cholesky_ex(A).info != 0).any()):
            raise SolverFailure(
                f"the lu solver found a matrix of shape {tuple(A.shape)} indefinite, and was told to raise: increase the damping."
            )
        factor, pivots, _ = torch.linalg.lu_factor_ex(A)
        self._check(factor.diagonal(dim1=-2, dim2=-1).abs(), A.abs().amax((-2, -1))[..., None], A.shape)
        return {"factor": factor, "pivots": pivots}

    def _invert(self, state: State) -> Tensor:
        factor: Tensor = state["factor"]
        return symmetrise(self._solve(state, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)))

    def _solve(self, state: State, V: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(state["factor"], state["pivots"], V)
        return solution


def _absolute(operator: Operator) -> Operator:
    if isinstance(operator, Shifted) and isinstance(operator.operator, Dense):
        operator = operator.operator.plus(operator.shift)
    if isinstance(operator, Dense):
        d, U = eigh(operator.matrix)
        return Dense((U * d.abs().unsqueeze(-2)) @ U.mT)
    if isinstance(operator, Diagonal):
        return Diagonal(operator.values.abs())
    if isinstance(operator, Kronecker):
        operator = operator.materialise()
        return Kronecker(*(_absolute(matrices(F)) for F in operator.factors), scale=number(operator.scale, operator).abs())
    return operator
