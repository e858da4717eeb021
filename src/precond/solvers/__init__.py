"""Solvers: how a damped operator is inverted."""

from __future__ import annotations

from precond.solvers.base import REGISTRY, Solver, State
from precond.solvers.bfgs import BFGS
from precond.solvers.cg import CG
from precond.solvers.cholesky import Cholesky
from precond.solvers.eigen import Eigen
from precond.solvers.elementwise import Elementwise
from precond.solvers.heavy_ball import HeavyBall
from precond.solvers.krylov import Krylov
from precond.solvers.lu import LU
from precond.solvers.neumann import Neumann
from precond.solvers.newton_schulz import NewtonSchulz
from precond.solvers.preconditioners import Jacobi
from precond.solvers.psgd import PSGD
from precond.solvers.qr_iteration import QRIteration
from precond.solvers.riemannian import Riemannian
from precond.solvers.smw import SMW
from precond.solvers.sparse_cholesky import SparseCholesky

names = REGISTRY.names
get = REGISTRY.get
register = REGISTRY.register
create = REGISTRY.create

__all__ = [
    "BFGS", "CG", "LU", "PSGD", "REGISTRY", "SMW", "Cholesky", "Eigen", "Elementwise", "HeavyBall", "Jacobi", "Krylov", "Neumann", "NewtonSchulz",
    "QRIteration", "Riemannian", "Solver", "SparseCholesky", "State", "create", "get", "names", "register",
]  # fmt: skip
