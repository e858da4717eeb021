"""LU factorisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.numerics import symmetrise
from precond.solvers.base import REGISTRY, State
from precond.solvers.factors import FactorSolver


@REGISTRY.register("lu")
@dataclass(frozen=True, kw_only=True)
class LU(FactorSolver):
    """C^-1 through a pivoted LU factorisation: dense and Kronecker operators that may be indefinite, as in Newton's method.

    Refresh 2 n^3 / 3 a matrix, apply 2 n^2. A stack is factorised at once.

    Raises:
        SolverFailure: a pivot is within rounding of zero against the largest entry of its matrix.

    >>> from precond.damping import Tikhonov
    >>> from precond.operators import Dense
    >>> solver = LU()
    >>> state = solver.init(Dense(torch.diag(torch.tensor([1.0, -2.0]))), Tikhonov(0.0))
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([ 1.0000, -0.5000])
    """

    def _factorise(self, A: Tensor) -> State:
        A = symmetrise(A)
        factor, pivots, _ = torch.linalg.lu_factor_ex(A)
        self._check(factor.diagonal(dim1=-2, dim2=-1).abs(), A.abs().amax((-2, -1))[..., None], A.shape)
        return {"factor": factor, "pivots": pivots}

    def _invert(self, state: State) -> Tensor:
        factor: Tensor = state["factor"]
        return symmetrise(self._solve(state, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)))

    def _solve(self, state: State, V: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(state["factor"], state["pivots"], V)
        return solution
