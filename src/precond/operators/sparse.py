"""A symmetric matrix of which only some entries are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.operators.base import Operator


class Sparse(Operator):
    """The entries of a symmetric matrix on a pattern, zero elsewhere.

    Args:
        indices: (2, m) int64, row and column of each kept entry, every pair (i, j), (j, i) once. An entry given twice counts twice.
        values: (m,).
        n: the number of rows.

    A product, the diagonal and the trace cost m. A masked matrix need not be semi-definite even if the whole one is, and has no
    factorisation of its own: solvers that need products take it; `SparsePrecision` is the sparse form that has an inverse.

    >>> C = Sparse(torch.tensor([[0, 1, 1], [0, 0, 2]]), torch.tensor([2.0, 1.0, 5.0]), 3)
    >>> C.to_dense()
    tensor([[2., 1., 0.],
            [1., 0., 5.],
            [0., 5., 0.]])
    """

    def __init__(self, indices: Tensor, values: Tensor, n: int) -> None:
        if values.dim() != 1 or indices.shape != (2, len(values)):
            raise ValueError(f"Sparse takes indices (2, m) and values (m,), not {tuple(indices.shape)} and {tuple(values.shape)}.")
        self.indices, self.values, self._n = indices, values, n

    @property
    def n(self) -> int:
        return self._n

    @property
    def _like(self) -> Tensor:
        return self.values

    def fields(self) -> dict[str, Any]:
        return {"indices": self.indices, "values": self.values, "n": self._n}

    @property
    def _mirrored(self) -> Tensor:
        """The values off the diagonal, which are there twice; zero on it."""
        row, column = self.indices
        return torch.where(row != column, self.values, 0.0)

    def _matmul(self, V: Tensor) -> Tensor:
        row, column = self.indices
        result = torch.zeros_like(V).index_add_(0, row, self.values.unsqueeze(1) * V[column])
        result.index_add_(0, column, self._mirrored.unsqueeze(1) * V[row])
        return result

    def to_dense(self) -> Tensor:
        row, column = self.indices
        dense = torch.zeros(self.n * self.n, dtype=self.dtype, device=self.device)
        dense.index_add_(0, row * self.n + column, self.values)
        return dense.index_add_(0, column * self.n + row, self._mirrored).reshape(self.n, self.n)

    def diagonal(self) -> Tensor:
        row, _ = self.indices
        return torch.zeros(self.n, dtype=self.dtype, device=self.device).index_add_(0, row, self.values - self._mirrored)

    def trace(self) -> Tensor:
        return (self.values - self._mirrored).sum()
