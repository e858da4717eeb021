"""The sparse factor of an inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from precond.damping import Damping
from precond.errors import SolverFailure
from precond.numerics import ROUNDING
from precond.operators import Operator, SparsePrecision
from precond.solvers.base import REGISTRY, Solver, State


@REGISTRY.register("sparse_cholesky")
@dataclass(frozen=True, kw_only=True)
class SparseCholesky(Solver):
    """C^-1 = (I - B)^T D^-1 (I - B), by two sparse products: for a matrix that is given by the sparse factor of its inverse.

    A number as damping is `Blockwise`: the network of F + damping I. Refresh n k^3 for k parents, at once; apply 4 n k. Only the power -1:
    the factor is no symmetric root. Sources: FANG, Grosse & Salakhutdinov 2015; the incomplete inverse Cholesky factorisation of
    Kolotilina & Yeremin 1993.

    Raises:
        SolverFailure: a coordinate has no variance of its own left, given its parents, or what is left is within rounding of zero.

    >>> from precond.damping import Blockwise
    >>> F = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> C = SparsePrecision(torch.stack([F, F.flip(0, 1)]), torch.tensor([[-1], [0]]))
    >>> solver = SparseCholesky()
    >>> state = solver.init(C, Blockwise(1.0))
    >>> solver.apply(state, torch.tensor([8.0, 0.0]))[0]  # the inverse of [[3, 1], [1, 3]]
    tensor([ 3., -1.])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({SparsePrecision})
    needs_definite: ClassVar[bool] = True

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        damped = self.damped(operator, damping)
        if not isinstance(damped, SparsePrecision):
            self.refuse(damped, "its damping is not that of the blocks it is made of; use Blockwise damping")
        coefficients, variances = damped.factors
        own = damped.blocks[:, 0, 0]
        if not bool((variances > ROUNDING * torch.finfo(own.dtype).eps * own).all()):
            raise SolverFailure(
                f"the {self.name} solver found a {operator.kind} operator of shape {tuple(operator.shape)} not positive definite to working "
                "precision: increase the damping, which must be positive."
            )
        return {"coefficients": coefficients, "variances": variances, "parents": damped.parents.clamp(min=0)}

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        B, parents = state["coefficients"].unsqueeze(2), state["parents"]
        scaled = (V - (B * V[parents]).sum(1)) / state["variances"].unsqueeze(1)
        return scaled.index_add(0, parents.flatten(), (B * scaled.unsqueeze(1)).flatten(0, 1), alpha=-1), state
