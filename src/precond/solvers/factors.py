"""What the solvers that factorise have in common: dense stacks, and Kronecker products factor by factor."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from precond.damping import Damping, Factored, Tikhonov
from precond.errors import SolverFailure
from precond.numerics import ROUNDING
from precond.operators import BlockDiagonal, Dense, Diagonal, Kronecker, Operator, Shifted, pack, unpack
from precond.operators.base import number
from precond.operators.kronecker import matrices
from precond.solvers.base import Solver, State


class FactorSolver(Solver):
    """A solver that factorises matrices: a dense one is kept factorised, a Kronecker one as the explicit inverses of its factors.

    A member writes three functions of stacks of matrices. Explicit inverses make an application one product a factor, which is what a
    Kronecker operator is for, and their error is that of small, separately damped matrices.
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({Dense, Kronecker})

    def natural_damping(self, structure: type[Operator]) -> type[Damping]:
        return Factored if issubclass(structure, Kronecker) else Tikhonov

    @abstractmethod
    def _factorise(self, A: Tensor) -> State:
        """The factorisation of symmetric matrices (..., n, n); raises `SolverFailure`."""

    @abstractmethod
    def _invert(self, state: State) -> Tensor:
        """A^-1, symmetric."""

    @abstractmethod
    def _solve(self, state: State, V: Tensor) -> Tensor:
        """A^-1 V for V (..., n, k)."""

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        damped = self.damped(operator, damping)
        if isinstance(damped, Shifted) and isinstance(damped.operator, Dense):
            damped = damped.operator.plus(damped.shift)
        if isinstance(damped, Dense):
            return self._factorise(damped.matrix) | {"size": damped.size}
        if isinstance(damped, Kronecker):
            damped = damped.materialise()
            inverses = [self.inverse(F) for F in damped.factors]
            scale = 1 / damped.scale if isinstance(damped.scale, float) and damped.scale else 1 / number(damped.scale, damped)
            if isinstance(scale, Tensor) and not bool(scale.isfinite().all()):
                raise SolverFailure(f"the {self.name} solver was given a Kronecker operator of scale 0, which is singular.")
            return {"inverse": pack(Kronecker(*inverses, scale=scale))}
        self.refuse(damped, "its damping is not factor-wise; use Factored damping, or the 'eigen' solver, which adds it exactly")

    def inverse(self, F: Operator) -> Operator:
        """The inverse of a factor of a Kronecker product, damped already."""
        if isinstance(F, BlockDiagonal):
            return F.with_blocks({name: self.inverse(block) for name, block in F.blocks.items()})
        F = matrices(F)
        if isinstance(F, Dense):
            return Dense(self._invert(self._factorise(F.matrix)))
        reciprocal = F.values.reciprocal()
        if not bool(reciprocal.isfinite().all()) or (self.needs_definite and bool((reciprocal < 0).any())):
            self._fail("a diagonal factor", F.values.shape)
        return Diagonal(reciprocal)

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        if "inverse" in state:
            return unpack(state["inverse"]) @ V, state
        factor: Tensor = state["factor"]
        return self._solve(state, V.reshape(*factor.shape[:-1], V.shape[1])).reshape(V.shape), state

    def _check(self, pivots: Tensor, scale: Tensor, shape: torch.Size) -> None:
        """Fail where a pivot is within rounding of zero against `scale`, which is to divide by noise, or is NaN."""
        if not bool((pivots > ROUNDING * torch.finfo(pivots.dtype).eps * scale).all()):
            self._fail("a matrix", shape)

    def _fail(self, what: str, shape: torch.Size) -> None:
        state = "not positive definite" if self.needs_definite else "singular"
        raise SolverFailure(
            f"the {self.name} solver found {what} of shape {tuple(shape)} {state} to working precision: "
            "increase the damping, which must be positive."
        )
