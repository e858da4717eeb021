"""The same damping for every Kronecker factor."""

from __future__ import annotations

from dataclasses import dataclass

from precond.damping.base import Damping, plus
from precond.errors import InvalidCombination
from precond.operators import Dense, Diagonal, Kronecker, KroneckerSum, Operator


@dataclass(frozen=True)
class PerFactor(Damping):
    """scale (F_1 + value I)^e (x) ... (x) (F_k + value I)^e: absolute, and inside the exponent.

    The damping of Shampoo (Gupta, Koren and Singer 2018), of TNT and of SINGD. In units of a factor, so that it does not see the scale of the
    product, and F -> c F is not balanced by another factor. The axes, or the terms, of a Kronecker sum are damped alike. Equal to `Tikhonov`
    on dense and diagonal operators.

    Raises:
        InvalidCombination: the operator has no factors.

    >>> import torch
    >>> C = Kronecker(torch.tensor([3.0]), torch.tensor([8.0]), exponent=0.5)
    >>> PerFactor(1.0)(C).diagonal()
    tensor([6.])
    """

    def _damp(self, operator: Operator, power: float) -> Operator:
        if isinstance(operator, (Dense, Diagonal)):
            return operator.plus(self.amount)
        if isinstance(operator, Kronecker):
            factors = (plus(F, self.amount) for F in operator.factors)
            return Kronecker(*factors, exponent=operator.exponent, scale=operator.scale)
        if isinstance(operator, KroneckerSum):
            terms = [self._damp(term, power) for term in operator.factors or operator.terms]
            return KroneckerSum(*terms, exponent=operator.exponent, scale=operator.scale)  # type: ignore[arg-type]  # each keeps its kind
        raise InvalidCombination(f"PerFactor damping needs Kronecker factors; for a {operator.kind} operator use Tikhonov.")
