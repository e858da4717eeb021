"""Damping of Kronecker factors that is balanced between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.damping.base import Damping, plus
from precond.errors import InvalidCombination
from precond.operators import Dense, Diagonal, Kronecker, Operator
from precond.operators.base import number


@dataclass(frozen=True)
class Factored(Damping):
    """Damping of each factor of a Kronecker operator, whose product stays a Kronecker product.

    With w_m = tr(F_m) / n_m, c = (prod w_m)^(1/k) and l = value / scale, factor m becomes F_m + l^(1/k) (w_m / c) I.
    For two factors, B (x) A, that is (B + sqrt(l) / pi I) (x) (A + pi sqrt(l) I) with pi^2 = (tr A / dim A) / (tr B / dim B)
    (Martens and Grosse 2015, section 6.3, arXiv 1503.05671). It exceeds C + value I by a positive semi-definite matrix.
    Where a mean trace is not positive and finite, w_m / c is 1. Equal to `Tikhonov` on dense and diagonal operators.

    Args:
        pi: False: w_m / c is 1.

    Raises:
        InvalidCombination: the operator is neither Kronecker nor dense nor diagonal.

    >>> C = Kronecker(torch.tensor([1.0]), torch.tensor([4.0]))
    >>> [F.values.item() for F in Factored(1.0)(C).factors]
    [1.5, 6.0]
    """

    pi: bool = True

    def _damp(self, operator: Operator, power: float) -> Operator:
        if isinstance(operator, (Dense, Diagonal)):
            return operator.plus(self.amount)
        if not isinstance(operator, Kronecker):
            raise InvalidCombination(f"Factored damping needs Kronecker factors; for a {operator.kind} operator use Tikhonov.")
        operator = operator.materialise()
        k = len(operator.factors)
        level = (number(self.amount, operator) / number(operator.scale, operator)) ** (1 / k)
        shifts = level * self._balance(operator)
        return Kronecker(*(plus(F, shift) for F, shift in zip(operator.factors, shifts, strict=True)), scale=operator.scale)

    def _balance(self, operator: Kronecker) -> Tensor:
        """w_m / c, (k, *batch), through logarithms, so that no product of traces overflows."""
        means = torch.stack([F.block_diagonals().mean(-1) for F in operator.factors])
        if not self.pi:
            return torch.ones_like(means)
        usable = ((means > 0) & means.isfinite()).all(0)
        logs = torch.where(usable, means, torch.ones_like(means)).log()
        return (logs - logs.mean(0)).exp()
