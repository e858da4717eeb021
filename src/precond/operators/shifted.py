"""An operator with a multiple of the identity added, to itself or to its power."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.operators.base import Operator, number
from precond.operators.spectral import Spectral


class Shifted(Operator):
    """C + shift I.

    Args:
        operator: C.
        shift: a number or a 0-dim tensor.

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

    def _matmul(self, V: Tensor) -> Tensor:
        return self.operator._matmul(V) + self.shift * V

    def to_dense(self) -> Tensor:
        return self.operator.to_dense() + self.shift * torch.eye(self.n, dtype=self.dtype, device=self.device)

    def diagonal(self) -> Tensor:
        return self.operator.diagonal() + self.shift

    def trace(self) -> Tensor:
        return self.operator.trace() + self.shift * self.n

    def spectral(self) -> Spectral:
        return self.operator.spectral().map(lambda s: s + self.shift)

    @property
    def noise(self) -> int:
        return self.operator.noise + self.n

    def _colour(self, Z: Tensor) -> Tensor:
        # a sample of C and an independent one of shift I
        inner = self.operator.noise
        return self.operator._colour(Z[:inner]) + number(self.shift, self).sqrt() * Z[inner:]


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
