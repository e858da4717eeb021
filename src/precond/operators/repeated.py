"""One operator for several coordinates alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from precond.operators.base import Operator


class Repeated(Operator):
    """I (x) C: the block-diagonal of `count` equal blocks C, of which one is held, damped and inverted.

    Args:
        operator: C, (n, n).
        count: how many there are. Vectors are (count, n), flattened.

    A product costs one of C with `count` columns.

    >>> from precond.operators import Dense
    >>> Repeated(Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), 2) @ torch.tensor([1.0, 0.0, 0.0, 1.0])
    tensor([2., 1., 1., 2.])
    """

    def __init__(self, operator: Operator, count: int) -> None:
        if count < 1:
            raise ValueError(f"Repeated holds at least one block, not {count}.")
        self.operator, self.count = operator, count
        self.live = operator.live

    @property
    def n(self) -> int:
        return self.count * self.operator.n

    @property
    def _like(self) -> Tensor:
        return self.operator._like

    def fields(self) -> dict[str, Any]:
        return {"operator": self.operator, "count": self.count}

    def with_operator(self, operator: Operator) -> Repeated:
        """As many of another block."""
        return Repeated(operator, self.count)

    def _matmul(self, V: Tensor) -> Tensor:
        return alongside(self.operator._matmul, V, self.count)

    def to_dense(self) -> Tensor:
        whole: Tensor = torch.block_diag(*[self.operator.to_dense()] * self.count)
        return whole

    def diagonal(self) -> Tensor:
        return self.operator.diagonal().repeat(self.count)

    def trace(self) -> Tensor:
        return self.operator.trace() * self.count

    def logdet(self) -> Tensor:
        return self.operator.logdet() * self.count

    @property
    def noise(self) -> int:
        return self.count * self.operator.noise

    def _colour(self, Z: Tensor) -> Tensor:
        return alongside(self.operator._colour, Z, self.count)

    def inverse_root(self, power: float) -> Callable[[Tensor], Tensor]:
        root = self.operator.inverse_root(power)
        return lambda Z: alongside(root, Z, self.count)


def alongside(function: Callable[[Tensor], Tensor], V: Tensor, count: int) -> Tensor:
    """A function of columns, applied to each of `count` equal pieces of the columns V (count n, k) at once."""
    n, k = V.shape[0] // count, V.shape[1]
    result = function(V.reshape(count, n, k).movedim(0, 1).reshape(n, count * k))
    m = result.shape[0]
    return result.reshape(m, count, k).movedim(0, 1).reshape(count * m, k)
