"""What the solvers that need products only have in common: any operator, live ones included, packed damped into the state."""

from __future__ import annotations

from typing import ClassVar

from precond.damping import Damping
from precond.operators import Kronecker, KroneckerSum, Operator, RootShifted, Shifted, SparsePrecision, pack, unpack
from precond.solvers.base import Solver, State


class ProductSolver(Solver):
    """A solver of operators known by their product alone."""

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset((Operator,))
    live: ClassVar[bool] = True

    def _packed(self, operator: Operator, damping: Damping) -> State:
        """The damped operator as an entry of the state."""
        return {"operator": pack(_materialise(self.damped(operator, damping)))}

    def _unpacked(self, state: State, operator: Operator | None) -> Operator:
        return unpack(state["operator"], operator)


def _materialise(damped: Operator) -> Operator:
    """The state should hold factors, not what would need an eigendecomposition at every application."""
    if isinstance(damped, (Kronecker, KroneckerSum, SparsePrecision)):
        return damped.materialise()
    if isinstance(damped, Shifted):
        return Shifted(_materialise(damped.operator), damped.shift)
    if isinstance(damped, RootShifted) and not damped.live:
        return damped.spectral()
    return damped
