"""The eigendecomposition of a low-rank operator, and functions of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precond.operators.spectral import Spectral

if TYPE_CHECKING:
    from precond.operators.row_form import RowForm


class LowRankEigen(Spectral):
    """rest I + V diag(values - rest) V^T, with V = U^T B orthonormal (its zero columns aside) and never formed.

    Args:
        rows: the operator U^T U, with r rows of p columns.
        vectors: B (*batch, r, m), m <= min(r, p). A column may be zero where its value is `rest`.
        values: (*batch, m), the eigenvalues in the row space.
        rest: 0-dim, the eigenvalue of everything orthogonal to the rows.

    A product costs two products with U and m r. `diagonal` forms V, m p numbers.

    >>> from precond.operators import LowRank
    >>> C = LowRank(torch.tensor([[2.0, 0.0, 0.0]])).spectral()
    >>> C.map(lambda s: 1 / (s + 1)).diagonal()
    tensor([0.2000, 1.0000, 1.0000])
    """

    def __init__(self, rows: RowForm, vectors: Tensor, values: Tensor, rest: Tensor) -> None:
        if vectors.shape[:-1] != (*rows.batch, rows.rank) or values.shape != (*rows.batch, vectors.shape[-1]):
            raise ValueError(
                f"{rows.rank} rows take vectors (*batch, {rows.rank}, m) and values (*batch, m), "
                f"not {tuple(vectors.shape)} and {tuple(values.shape)}."
            )
        self.rows, self.vectors, self.values, self.rest = rows, vectors, values, rest

    @property
    def n(self) -> int:
        return self.rows.n

    @property
    def _like(self) -> Tensor:
        return self.values

    @property
    def spectrum(self) -> Tensor:  # type: ignore[override]
        """The eigenvalues in the row space, and `rest` once where there is anything orthogonal to it; (m,) or (m + 1,) a matrix."""
        return torch.cat([self.values.reshape(-1), self.rest.reshape(1)]) if self._others else self.values.reshape(-1)

    @property
    def _others(self) -> int:
        return self.n - self.values.numel()

    def fields(self) -> dict[str, Any]:
        return {"rows": self.rows, "vectors": self.vectors, "values": self.values, "rest": self.rest}

    def map(self, function: Callable[[Tensor], Tensor]) -> LowRankEigen:
        rest = function(self.rest)
        if not self._others:  # an infinite one would multiply nothing: with a zero column its value would be infinite as well
            rest = rest.nan_to_num(0.0, 0.0, 0.0)
        return LowRankEigen(self.rows, self.vectors, function(self.values), rest)

    def _matmul(self, V: Tensor) -> Tensor:
        inside = self.vectors.mT @ self.rows.left(V)
        return self.rows.right(self.vectors @ ((self.values - self.rest).unsqueeze(-1) * inside)).addcmul_(V, self.rest)

    def diagonal(self) -> Tensor:
        V = self.rows.right(self.vectors).reshape(*self.rows.batch, self.rows.size, -1)
        return self.rest + (V.square() @ (self.values - self.rest).unsqueeze(-1)).reshape(-1)

    def trace(self) -> Tensor:
        return self.values.sum() + self._others * self.rest

    def logdet(self) -> Tensor:
        inside = self.values.log().sum()
        return inside + self._others * self.rest.log() if self._others else inside
