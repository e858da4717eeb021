"""A multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precond.damping.base import Amount, Damping
from precond.operators import Dense, Diagonal, Operator, Shifted


@dataclass(frozen=True)
class Tikhonov(Damping):
    """C + value I, inside the power.

    >>> Tikhonov(0.5)(Diagonal(torch.ones(2))).diagonal()
    tensor([1.5000, 1.5000])
    >>> Tikhonov(lambda step: 0.5 ** step).at(2)
    Tikhonov(value=0.25)
    """

    @property
    def keeps_eigenvectors(self) -> bool:
        return True

    def _damp(self, operator: Operator, power: float) -> Operator:
        if self.absent:
            return operator
        if isinstance(operator, (Dense, Diagonal)):
            return operator.plus(self.amount)
        if isinstance(operator, Shifted):
            return Shifted(operator.operator, operator.shift + self.amount)
        return Shifted(operator, self.amount)


def resolve(value: Amount | Damping, natural: type[Damping]) -> Damping:
    """A damping object, from one or from a number or a function of the step, which becomes the object natural to the cell.

    >>> resolve(1e-3, Tikhonov)
    Tikhonov(value=0.001)
    """
    if isinstance(value, Damping):
        return value.resolved(natural)
    if isinstance(value, bool) or not (isinstance(value, (int, float, torch.Tensor)) or callable(value)):
        raise TypeError(f"damping is a number or an object of precond.damping, or a function of the step, not a {type(value).__name__}.")
    return natural(value)
