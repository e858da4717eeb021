"""A symmetric matrix, or the block-diagonal of a stack of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.numerics import eigh, matrix_power, round_off
from precond.operators.base import Operator
from precond.operators.kronecker_eigen import KroneckerEigen


class Dense(Operator):
    """A symmetric matrix held as it is.

    Args:
        matrix: (*batch, n, n). A stack stands for the block-diagonal of its b matrices, of size b n, on vectors (b, n) flattened.

    A product costs b n^2. The matrix is trusted to be symmetric; solvers take its symmetric part.

    >>> C = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> C @ torch.tensor([1.0, 0.0]), C.trace()
    (tensor([2., 1.]), tensor(4.))
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"Dense takes a square matrix (n, n) or a stack of them (b, n, n), not shape {tuple(matrix.shape)}.")
        self.matrix = matrix

    @property
    def batch(self) -> torch.Size:
        """The leading dimensions of the stack, () for one matrix."""
        return self.matrix.shape[:-2]

    @property
    def size(self) -> int:
        """The number of rows of one matrix of the stack."""
        return self.matrix.shape[-1]

    @property
    def n(self) -> int:
        return self.batch.numel() * self.size

    @property
    def _like(self) -> Tensor:
        return self.matrix

    def fields(self) -> dict[str, Any]:
        return {"matrix": self.matrix}

    def _matmul(self, V: Tensor) -> Tensor:
        return (self.matrix @ V.reshape(*self.batch, self.size, -1)).reshape(self.n, -1)

    def to_dense(self) -> Tensor:
        return torch.block_diag(*self.matrix.flatten(0, -3)) if self.batch else self.matrix

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1).reshape(-1)

    def block_diagonals(self) -> Tensor:
        """The diagonal of each matrix of the stack, (*batch, n)."""
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def power(self, p: float) -> Dense:
        """Each matrix to the power p; negative eigenvalues count as 0. Costs an eigendecomposition."""
        return Dense(matrix_power(self.matrix, p))

    def plus(self, shift: Tensor | float) -> Dense:
        """C + shift I; `shift` is a number or (*batch)."""
        shifted = self.matrix.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(torch.as_tensor(shift, dtype=self.dtype, device=self.device)[..., None])
        return Dense(shifted)

    def spectral(self) -> KroneckerEigen:
        d, U = eigh(self.matrix.reshape(-1, self.size, self.size))
        return KroneckerEigen((U,), round_off(d))

    def _colour(self, Z: Tensor) -> Tensor:
        return self.power(0.5)._matmul(Z)
