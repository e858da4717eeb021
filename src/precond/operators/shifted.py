"""An operator with a multiple of the identity added, to itself or to its power."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.errors import InvalidCombination
from precond.operators.base import Operator, number
from precond.operators.spectral import Spectral


class Shifted(Operator):
    """C + shift I.

    Args:
        operator: C.
        shift: a number or a 0-dim tensor; or one a matrix of a stack, (*batch).

    >>> from precond.operators import Kronecker
    >>> Shifted(Kronecker(torch.ones(2), torch.ones(2)), 0.5).diagonal()
    tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """

    def __init__(self, operator: Operator, shift: float | Tensor) -> None:
        self.operator, self.shift = operator, shift
        self.live = operator.live

    @property
    def n(self) -> int:
        return self.operator.n

    @property
    def _like(self) -> Tensor:
        return self.operator._like

    def fields(self) -> dict[str, Any]:
        return {"operator": self.operator, "shift": self.shift}

    @property
    def batch(self) -> torch.Size:
        return self.operator.batch

    def _matmul(self, V: Tensor) -> Tensor:
        return self.operator._matmul(V) + spread(self.shift, self.size) * V

    def to_dense(self) -> Tensor:
        return self.operator.to_dense() + spread(self.shift, self.size) * torch.eye(self.n, dtype=self.dtype, device=self.device)

    def diagonal(self) -> Tensor:
        return (self.operator.diagonal().unsqueeze(1) + spread(self.shift, self.size)).squeeze(1)

    def trace(self) -> Tensor:
        return self.operator.trace() + number(self.shift, self).mean() * self.n

    def spectral(self) -> Spectral:
        if isinstance(self.shift, Tensor) and self.shift.dim():
            raise InvalidCombination(
                "a stack with a shift for each of its matrices has no spectrum of one shift: use Dense(operator.to_dense())."
            )
        return self.operator.spectral().map(lambda s: s + self.shift)

    @property
    def noise(self) -> int:
        return self.operator.noise + self.n

    def _colour(self, Z: Tensor) -> Tensor:
        # a sample of C and an independent one of shift I
        inner, root = self.operator.noise, number(spread(self.shift, self.size), self).sqrt()
        return self.operator._colour(Z[:inner]) + root * Z[inner:]


def spread(shift: float | Tensor, size: int) -> float | Tensor:
    """A shift as it multiplies columns: a number as it is; one a matrix of a stack, each of `size` rows, as (n, 1)."""
    return shift.reshape(-1).repeat_interleave(size).unsqueeze(1) if isinstance(shift, Tensor) and shift.dim() else shift


class RootShifted(Operator):
    """(C^power + shift I)^(1/power): damping added outside the power, as in Adam, AdaGrad and SOAP.

    Args:
        operator: C, positive semi-definite; negative eigenvalues count as 0.
        shift: a number or a 0-dim tensor, in units of C^power.
        power: p, not 0.

    Its own power -p is (C^p + shift I)^(-1). Needs an eigendecomposition of C, made once; none where C is diagonal.

    >>> from precond.operators import Diagonal
    >>> RootShifted(Diagonal(torch.tensor([4.0])), 1.0, 0.5).diagonal()
    tensor([9.])
    """

    def __init__(self, operator: Operator, shift: float | Tensor, power: float) -> None:
        if power == 0:
            raise ValueError("RootShifted has no power 0: (C^0 + shift I)^(1/0) is not defined.")
        self.operator, self.shift, self.power = operator, shift, power
        self.live = operator.live

    @property
    def n(self) -> int:
        return self.operator.n

    @property
    def _like(self) -> Tensor:
        return self.operator._like

    def fields(self) -> dict[str, Any]:
        return {"operator": self.operator, "shift": self.shift, "power": self.power}

    @cached_property
    def _spectral(self) -> Spectral:
        return self.operator.spectral().map(lambda s: (s.clamp(min=0).pow(self.power) + self.shift).pow(1 / self.power))

    def spectral(self) -> Spectral:
        return self._spectral

    def _matmul(self, V: Tensor) -> Tensor:
        return self._spectral._matmul(V)

    def diagonal(self) -> Tensor:
        return self._spectral.diagonal()

    def trace(self) -> Tensor:
        return self._spectral.trace()

    def _colour(self, Z: Tensor) -> Tensor:
        return self._spectral._colour(Z)
