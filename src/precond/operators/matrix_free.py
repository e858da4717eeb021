"""An operator known by its product alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from precond.errors import UsageError
from precond.operators.base import Operator


class MatrixFree(Operator):
    """C given as a function v -> C v; it lives as long as that function does, and is neither saved nor cast.

    Args:
        product: maps (n,) to (n,), linear and symmetric.
        n, dtype, device: of the vectors it takes.
        estimate: (n,), something like the diagonal, for who is to precondition with it. `diagonal()` is the diagonal itself.

    Columns are multiplied one by one; `to_dense`, `diagonal` and `trace` cost n products.

    >>> MatrixFree(lambda v: 2 * v, 3, torch.float32, "cpu") @ torch.ones(3)
    tensor([2., 2., 2.])
    """

    live = True

    def __init__(
        self, product: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype, device: torch.device | str, estimate: Tensor | None = None
    ) -> None:
        self.estimate = estimate
        self.product, self._n, self._empty = product, n, torch.empty(0, dtype=dtype, device=device)

    @property
    def n(self) -> int:
        return self._n

    @property
    def _like(self) -> Tensor:
        return self._empty

    def fields(self) -> dict[str, Any]:
        return {"n": self._n}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        if self._empty.to(device=device, dtype=dtype) is self._empty:
            return self
        raise UsageError("a MatrixFree operator cannot be cast: its product computes in the dtype and on the device it was made for.")

    def _matmul(self, V: Tensor) -> Tensor:
        return torch.stack([self.product(v) for v in V.unbind(1)], dim=1) if V.shape[1] else V
