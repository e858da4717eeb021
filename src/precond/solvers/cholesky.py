"""Cholesky factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from precond.solvers.base import REGISTRY, State
from precond.solvers.factors import Applied, FactorSolver


@REGISTRY.register("cholesky")
@dataclass(frozen=True, kw_only=True)
class Cholesky(FactorSolver):
    """C^-1 through C = L L^T, for positive definite dense operators, and for Kronecker ones factor by factor.

    Refresh n^3 / 3 a matrix, apply 2 n^2 a column, by two triangular solves or by a product with the explicit inverse. A stack is
    factorised at once.

    Args:
        applied: "solve", "inverse", or "auto": the inverse is formed, for 2 n^3 / 3, once a matrix has been applied to n / 2 columns since its
            refresh. Measured in float32 on one CPU core, that costs as much as solving for 0.4 n (n = 64 to 257) to 0.7 n (n = 785 to
            1,025) columns costs more than multiplying them.

    Raises:
        SolverFailure: a pivot is not positive, or is within rounding of zero against its diagonal entry.

    >>> from precond.damping import Tikhonov
    >>> from precond.operators import Dense
    >>> solver = Cholesky()
    >>> state = solver.init(Dense(torch.eye(2)), Tikhonov(1.0))
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([0.5000, 0.5000])
    """

    needs_definite: ClassVar[bool] = True
    break_even: ClassVar[float] = 0.5

    applied: Applied = "auto"

    def _factorise(self, A: Tensor) -> State:
        L, info = torch.linalg.cholesky_ex(A)
        pivots = torch.where(info[..., None] == 0, L.diagonal(dim1=-2, dim2=-1).square(), -1.0)  # what follows a failure is garbage
        self._check(pivots, A.diagonal(dim1=-2, dim2=-1), A.shape)
        return {"factor": L}

    def _invert(self, state: State) -> Tensor:
        return torch.cholesky_inverse(state["factor"])

    def _solve(self, state: State, V: Tensor) -> Tensor:
        return torch.cholesky_solve(V, state["factor"])
