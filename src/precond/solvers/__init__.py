"""Solvers: how a damped operator is inverted."""

from __future__ import annotations

from precond.solvers.base import REGISTRY, Solver, State
from precond.solvers.bfgs import BFGS
from precond.solvers.cg import CG
from precond.solvers.cholesky import Cholesky
from precond.solvers.eigen import Eigen
from precond.solvers.elementwise import Elementwise
from precond.solvers.lu import LU
from precond.solvers.smw import SMW

names = REGISTRY.names
get = REGISTRY.get
register = REGISTRY.register
create = REGISTRY.create

__all__ = ["BFGS", "CG", "LU", "REGISTRY", "SMW", "Cholesky", "Eigen", "Elementwise", "Solver", "State", "create", "get", "names", "register"]
