"""Damping of what a sparse precision is made of."""

from __future__ import annotations

from dataclasses import dataclass

from precond.damping.base import Damping
from precond.errors import InvalidCombination
from precond.operators import Dense, Diagonal, Operator, SparsePrecision


@dataclass(frozen=True)
class Blockwise(Damping):
    """F + value I, where F is what a `SparsePrecision` is made of: added to its blocks before they become the network.

    That is the sparse inverse of F + value I, not C + value I. Equal to `Tikhonov` on dense and diagonal operators.

    Raises:
        InvalidCombination: the operator is neither a `SparsePrecision` nor dense nor diagonal.

    >>> import torch
    >>> F = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> C = SparsePrecision(torch.stack([F, F.flip(0, 1)]), torch.tensor([[-1], [0]]))
    >>> Blockwise(1.0)(C).to_dense()
    tensor([[3., 1.],
            [1., 3.]])
    """

    def _damp(self, operator: Operator, power: float) -> Operator:
        if not isinstance(operator, (Dense, Diagonal, SparsePrecision)):
            raise InvalidCombination(
                f"Blockwise damping is added to the blocks of a SparsePrecision; for a {operator.kind} operator use Tikhonov."
            )
        return operator.plus(self.amount)
