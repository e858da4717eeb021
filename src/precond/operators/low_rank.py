"""A low-rank matrix, by its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.operators.row_form import RowForm


class LowRank(RowForm):
    """U^T W U, held as r rows.

    Args:
        rows: U (*batch, r, p): scaled gradients for a Fisher matrix, the orthonormal eigenvectors of a truncated eigendecomposition, the
            window of M-FAC and GGT. A stack is the block-diagonal of its matrices.
        weights: None for W = I, a diagonal (*batch, r), or a symmetric (*batch, r, r); may be indefinite, as the eigenvalues of a Hessian
            are and the middle matrix of L-BFGS is.
        gram: U U^T (*batch, r, r) where it is known, such as the rolling one of a window, which saves r^2 p.

    Memory and product r p; the spectrum r^2 p + 10 r^3.

    >>> C = LowRank(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([3.0]))
    >>> C @ torch.ones(3), C.trace()
    (tensor([ 9., 18.,  0.]), tensor(15.))
    """

    def __init__(self, rows: Tensor, weights: Tensor | None = None, gram: Tensor | None = None) -> None:
        if rows.dim() < 2:
            raise ValueError(f"LowRank takes rows (r, p) or a stack of them (b, r, p), not shape {tuple(rows.shape)}.")
        self.rows, self.weights, self._known_gram = rows, weights, gram
        self._check_weights()

    @property
    def batch(self) -> torch.Size:
        return self.rows.shape[:-2]

    @property
    def rank(self) -> int:
        return self.rows.shape[-2]

    @property
    def size(self) -> int:
        return self.rows.shape[-1]

    @property
    def _like(self) -> Tensor:
        return self.rows

    def fields(self) -> dict[str, Any]:
        return {"rows": self.rows} | self._extra_fields()

    def unweighted(self) -> LowRank:
        return self if self.weights is None and self._known_gram is None else LowRank(self.rows)

    def _left(self, V: Tensor) -> Tensor:
        return self.rows @ V

    def _right(self, B: Tensor) -> Tensor:
        return self.rows.mT @ B

    def _compute_gram(self) -> Tensor:
        return self.rows @ self.rows.mT

    def to_dense(self) -> Tensor:
        stack = self.rows.mT @ self.weigh(self.rows)
        return torch.block_diag(*stack.flatten(0, -3)) if self.batch else stack

    def diagonal(self) -> Tensor:
        return (self.rows * self.weigh(self.rows)).sum(-2).reshape(-1)
