"""A diagonal matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.operators.base import Operator
from precond.operators.kronecker_eigen import KroneckerEigen


class Diagonal(Operator):
    """diag(d): product, powers and inverse cost n.

    Args:
        diagonal: (*batch, n); a stack is the block-diagonal of its diagonals, which is the diagonal of the flattened stack. Kept as
            `values`.

    >>> Diagonal(torch.tensor([1.0, 2.0])) @ torch.ones(2)
    tensor([1., 2.])
    """

    def __init__(self, diagonal: Tensor) -> None:
        if diagonal.dim() < 1:
            raise ValueError("Diagonal takes a vector (n,) or a stack of them (b, n), not a number.")
        self.values = diagonal

    @property
    def batch(self) -> torch.Size:
        """The leading dimensions of the stack, () for one diagonal."""
        return self.values.shape[:-1]

    @property
    def size(self) -> int:
        """The number of rows of one diagonal of the stack."""
        return self.values.shape[-1]

    @property
    def n(self) -> int:
        return self.values.numel()

    @property
    def _like(self) -> Tensor:
        return self.values

    def fields(self) -> dict[str, Any]:
        return {"diagonal": self.values}

    def _matmul(self, V: Tensor) -> Tensor:
        return self.values.reshape(-1, 1) * V

    def to_dense(self) -> Tensor:
        return torch.diag(self.values.reshape(-1))

    def diagonal(self) -> Tensor:
        return self.values.reshape(-1)

    def block_diagonals(self) -> Tensor:
        """The diagonal of each matrix of the stack, (*batch, n)."""
        return self.values

    def power(self, p: float) -> Diagonal:
        """d^p; negative entries count as 0."""
        return Diagonal(self.values.clamp(min=0).pow(p))

    def plus(self, shift: Tensor | float) -> Diagonal:
        """C + shift I; `shift` is a number or (*batch)."""
        return Diagonal(self.values + torch.as_tensor(shift, dtype=self.dtype, device=self.device)[..., None])

    def spectral(self) -> KroneckerEigen:
        return KroneckerEigen((None,), self.values.reshape(-1, self.size))

    def _colour(self, Z: Tensor) -> Tensor:
        return self.power(0.5)._matmul(Z)
