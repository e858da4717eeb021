"""A damped inverse power, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from precond.errors import UsageError
from precond.operators.base import Operator, inverse_power
from precond.operators.block_diagonal import BlockDiagonal
from precond.operators.spectral import Spectral


class Applies(Protocol):
    """The part of a solver that applies what it has prepared."""

    def apply(self, state: dict[str, Any], vector: Tensor, operator: Operator | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The inverse power times `vector`, and the new state."""
        ...


class Inverse(Operator):
    """damped^(-power), applied by a solver.

    Args:
        solver: what applies it.
        state: what the solver prepared; it is not changed, so that products do not depend on those before.
        damped: the damped operator, which says what is inverted.
        power: the inverse power.
        operator: the operator before damping, handed to the solver where it is matrix-free.
    """

    def __init__(self, solver: Applies, state: dict[str, Any], damped: Operator, power: float, operator: Operator) -> None:
        self.solver, self.state, self.damped, self.power, self.operator = solver, state, damped, power, operator
        self.live = operator.live

    @property
    def n(self) -> int:
        return self.damped.n

    @property
    def _like(self) -> Tensor:
        return self.damped._like

    def fields(self) -> dict[str, Any]:
        raise UsageError("an inverse is a solver and its state: pack or cast the operator it was made from, and invert that again.")

    def _matmul(self, V: Tensor) -> Tensor:
        return self.solver.apply(dict(self.state), V, self.operator)[0]

    def logdet(self) -> Tensor:
        return -self.power * self.damped.logdet()

    def spectral(self) -> Spectral:
        return self.damped.spectral().map(lambda s: inverse_power(s, self.power))

    @cached_property
    def _root(self) -> Callable[[Tensor], Tensor]:
        return self.damped.inverse_root(self.power)

    def _colour(self, Z: Tensor) -> Tensor:
        return self._root(Z)


class InverseBlockDiagonal(BlockDiagonal):
    """Inverses of the blocks of a `BlockDiagonal`, on the same coordinates; zero on coordinates that no block has."""

    def __init__(self, blocks: Mapping[str, Inverse | InverseBlockDiagonal], positions: Mapping[str, Tensor], n: int) -> None:
        super().__init__(blocks, positions, n)
        self.damped: BlockDiagonal = BlockDiagonal({name: block.damped for name, block in blocks.items()}, positions, n)
