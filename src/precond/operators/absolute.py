"""The absolute value of an operator known by its product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.lanczos import function_times_vector
from precond.operators.base import Operator
from precond.operators.spectral import Spectral


class Absolute(Operator):
    """|C| = V |L| V^T of a symmetric C = V L V^T, from products with C alone.

    Args:
        operator: C, matrix-free or not.
        steps: of the Lanczos process, and so products with C, for each product with |C|; exact where they exhaust the Krylov space.

    A solver that works in a Krylov space takes functions of C itself and never forms this product.

    >>> from precond.operators import Diagonal
    >>> (Absolute(Diagonal(torch.tensor([1.0, -2.0]))) @ torch.ones(2)).round()
    tensor([1., 2.])
    """

    def __init__(self, operator: Operator, steps: int = 50) -> None:
        self.operator, self.steps = operator, steps
        self.live = operator.live

    @property
    def n(self) -> int:
        return self.operator.n

    @property
    def _like(self) -> Tensor:
        return self.operator._like

    def fields(self) -> dict[str, Any]:
        return {"operator": self.operator, "steps": self.steps}

    def _matmul(self, V: Tensor) -> Tensor:
        products = [function_times_vector(self.operator.__matmul__, torch.abs, v, self.steps) for v in V.unbind(1)]
        return torch.stack(products, dim=1) if products else V

    def spectral(self) -> Spectral:
        return self.operator.spectral().map(torch.abs)

    def _colour(self, Z: Tensor) -> Tensor:
        return torch.stack(
            [function_times_vector(self.operator.__matmul__, lambda s: s.abs().sqrt(), z, self.steps) for z in Z.unbind(1)], dim=1
        )
