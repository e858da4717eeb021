"""An operator whose eigendecomposition is known."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

from torch import Tensor

from precond.operators.base import Operator


class Spectral(Operator):
    """C = V diag(s) V^T with V orthogonal, so that any function of C is that function of the spectrum.

    A new one writes `spectrum`, `map` and what every operator writes.
    """

    spectrum: Tensor
    """Every eigenvalue there is, those with many eigenvectors perhaps once."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """f(C): the function, element by element, applied to the spectrum."""

    def spectral(self) -> Self:
        return self

    def _colour(self, Z: Tensor) -> Tensor:
        return self.map(lambda s: s.clamp(min=0).sqrt())._matmul(Z)
