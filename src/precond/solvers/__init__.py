"""Solvers: how a damped operator is inverted."""

from __future__ import annotations

from precond.solvers.base import REGISTRY, Solver, State
from precond.solvers.cg import CG
from precond.solvers.cholesky import Cholesky
from precond.solvers.eigen import Eigen
from precond.solvers.elementwise import Elementwise
from precond.solvers.lu import LU

names = REGISTRY.names
get = REGISTRY.get
register = REGISTRY.register
create = REGISTRY.create

__all__ = ["CG", "LU", "REGISTRY", "Cholesky", "Eigen", "Elementwise", "Solver", "State", "create", "get", "names", "register"]
