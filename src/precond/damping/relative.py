"""Damping in units of the matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from precond.damping.base import SMALLEST
from precond.damping.formed import Formed
from precond.errors import InvalidCombination
from precond.operators import Operator

Of = Literal["mean", "largest"]


@dataclass(frozen=True)
class Relative(Formed):
    """value * |tr C| / n, or value * max |lambda(C)|, as the amount of another damping: it does not see the scale of C.

    Of a block-diagonal operator each block has its own. Where C is zero the unit is 1. Cost: a trace, or an eigendecomposition, a refresh.

    Args:
        of: "mean", of the eigenvalues, or "largest".
        form: how the amount is added; see `Formed`.

    Raises:
        InvalidCombination: the operator is matrix-free, whose trace costs n products, or (largest) has no eigendecomposition of its parts.

    >>> from precond.operators import Diagonal
    >>> Relative(0.5)(Diagonal(torch.tensor([1.0, 3.0]))).diagonal()
    tensor([2., 4.])
    """

    of: Of = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in get_args(Of):
            raise ValueError(f"Relative(of={self.of!r}): choose one of {', '.join(map(repr, get_args(Of)))}.")

    def _damp(self, operator: Operator, power: float) -> Operator:
        if operator.live:
            raise InvalidCombination(
                "the scale of a matrix-free operator costs n products, so there is no Relative damping of it: use Tikhonov."
            )
        return self.shaped(self.amount * self._unit(operator))(operator, power)

    def _unit(self, operator: Operator) -> Tensor:
        size = operator.trace().abs() / operator.n if self.of == "mean" else operator.spectral().spectrum.abs().amax()
        return torch.where(size > 0, size, torch.ones_like(size))

    def boosted(self, factor: float, operator: Operator) -> Self:
        return replace(self, value=SMALLEST if bool(self.amount == 0) else self.amount * factor)
