"""Eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from precond.operators import Dense, Diagonal, Gram, Kronecker, KroneckerEigen, KroneckerSum, LowRank, LowRankEigen, Operator
from precond.solvers.base import REGISTRY
from precond.solvers.spectral import SpectralSolver


@REGISTRY.register("eigen")
@dataclass(frozen=True, kw_only=True)
class Eigen(SpectralSolver):
    """damped^(-power) through C = U diag(d) U^T; a Kronecker operator in the joint eigenbasis of its factors.

    There scale * prod d_m^e + damping is exact Tikhonov damping, any power of it costs the same, and so does damping outside the power.
    Refresh about 10 n^3 a matrix, apply 4 n^2, or two products a factor. For a Kronecker operator this is K-FAC with exact damping
    (Grosse and Martens 2016, appendix). A low-rank operator is decomposed on the side of its r rows, r^2 n + 10 r^3, and the rest of the
    space has the eigenvalue 0; so it is the solver for an indefinite one. Options: see `SpectralSolver`.

    Raises:
        SolverFailure: a damped eigenvalue is zero, or negative with a power other than 1.

    >>> import torch
    >>> from precond.damping import Tikhonov
    >>> solver = Eigen(power=0.5)
    >>> state = solver.init(Kronecker(torch.ones(2), torch.tensor([3.0])), Tikhonov(1.0))
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([0.5000, 0.5000])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset(
        {Dense, Diagonal, Gram, Kronecker, KroneckerEigen, KroneckerSum, LowRank, LowRankEigen}
    )
