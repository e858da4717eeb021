"""Damping added outside the power."""

from __future__ import annotations

from dataclasses import dataclass

from precond.damping.base import Damping
from precond.damping.tikhonov import Tikhonov
from precond.errors import InvalidCombination
from precond.operators import Operator, RootShifted


@dataclass(frozen=True)
class Outside(Damping):
    """(C^p + value I)^(1/p) for a solver of power p, so that what is applied is (C^p + value I)^(-1): Adam, RMSprop, AdaGrad, SOAP.

    The same as `Tikhonov` for p = 1.

    >>> import torch
    >>> from precond.operators import Diagonal
    >>> Outside(1.0)(Diagonal(torch.tensor([4.0])), power=0.5).diagonal()
    tensor([9.])
    """

    @property
    def keeps_eigenvectors(self) -> bool:
        return True

    def _damp(self, operator: Operator, power: float) -> Operator:
        if power == 1 or self.absent:
            return Tikhonov(self.amount)(operator)
        if operator.live:
            raise InvalidCombination("a matrix-free operator has no eigendecomposition for Outside damping with a power: use Tikhonov.")
        return RootShifted(operator, self.amount, power)
