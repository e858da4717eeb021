"""What low-rank operators have in common: C = U^T W U, known by products with U and by the small Gram matrix U U^T."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from precond.numerics import eigh, symmetrise
from precond.operators.base import Operator
from precond.operators.low_rank_eigen import LowRankEigen


class RowForm(Operator):
    """U^T W U with r rows U (*batch, r, p); a batch is the block-diagonal of its matrices, on vectors (*batch, p) flattened.

    `weights`: None for W = I, (*batch, r) for a diagonal W, or a symmetric (*batch, r, r), such as I - c c^T, which takes a mean off.
    They may be indefinite.

    A new one writes `batch`, `rank`, `size`, `_left`, `_right`, `_compute_gram` and `unweighted`.
    """

    weights: Tensor | None
    _known_gram: Tensor | None

    # --- what a form writes

    @property
    @abstractmethod
    def batch(self) -> torch.Size:
        """The leading dimensions of the stack, () for one matrix."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """r, the number of rows, which bounds the rank of one matrix of the stack."""

    @property
    @abstractmethod
    def size(self) -> int:
        """p, the number of columns of U of one matrix of the stack."""

    @abstractmethod
    def _left(self, V: Tensor) -> Tensor:
        """U V: (*batch, p, k) -> (*batch, r, k)."""

    @abstractmethod
    def _right(self, B: Tensor) -> Tensor:
        """U^T B: (*batch, r, k) -> (*batch, p, k)."""

    @abstractmethod
    def _compute_gram(self) -> Tensor:
        """U U^T, (*batch, r, r)."""

    @abstractmethod
    def unweighted(self) -> Self:
        """U^T U, of the same rows."""

    # --- what follows

    @property
    def n(self) -> int:
        return self.batch.numel() * self.size

    @cached_property
    def gram(self) -> Tensor:
        """U U^T, (*batch, r, r), computed once; the weights are not in it."""
        return self._compute_gram() if self._known_gram is None else self._known_gram

    def afresh(self) -> Self:
        """The same operator, whose Gram matrix is to be computed from the rows."""
        return type(self).from_fields({name: value for name, value in self.fields().items() if name != "gram"})

    def left(self, v: Tensor) -> Tensor:
        """U v for `v` (n,) or (n, k): (*batch, r) or (*batch, r, k)."""
        columns = self._left(v.reshape(*self.batch, self.size, -1))
        return columns.squeeze(-1) if v.dim() == 1 else columns

    def right(self, b: Tensor) -> Tensor:
        """U^T b for `b` (*batch, r) or (*batch, r, k): (n,) or (n, k)."""
        one = b.dim() == len(self.batch) + 1
        columns = self._right(b.unsqueeze(-1) if one else b).reshape(self.n, -1)
        return columns.squeeze(-1) if one else columns

    def weigh(self, B: Tensor) -> Tensor:
        """W B for B (*batch, r, k)."""
        if self.weights is None:
            return B
        return self.weights.unsqueeze(-1) * B if self._diagonal_weights else self.weights @ B

    @property
    def _diagonal_weights(self) -> bool:
        return self.weights is not None and self.weights.dim() == len(self.batch) + 1

    def root_weights(self) -> Tensor | None:
        """The root of diagonal weights, ones where there are none; None where W is not diagonal or not semi-definite. Reads them on the host."""
        if self.weights is None:
            return torch.ones((*self.batch, self.rank), dtype=self.dtype, device=self.device)
        if not self._diagonal_weights or bool((self.weights < 0).any()):
            return None
        return self.weights.sqrt()

    def _matmul(self, V: Tensor) -> Tensor:
        return self.right(self.weigh(self.left(V)))

    def trace(self) -> Tensor:
        if self._diagonal_weights:
            assert self.weights is not None
            return (self.weights * self.gram.diagonal(dim1=-2, dim2=-1)).sum()
        return self.gram.diagonal(dim1=-2, dim2=-1).sum() if self.weights is None else (self.weights * self.gram).sum()

    def spectral(self) -> LowRankEigen:
        """By eigendecompositions of the Gram side, r^3; eigenvalues within r times rounding of zero are zero."""
        K = symmetrise(self.gram)
        d, Z = eigh(K)
        d, Z = d[..., -self.size :], Z[..., -self.size :]  # the others are zero: no matrix of p columns has more than p
        kept = d > _noise(d)
        root = torch.where(kept, d, torch.zeros_like(d)).sqrt()
        vectors = Z * torch.where(kept, d, torch.ones_like(d)).rsqrt().mul(kept).unsqueeze(-2)
        if self.weights is None:
            return LowRankEigen(self.unweighted(), vectors, root.square(), d.new_zeros(()))
        R = Z * root.unsqueeze(-2)
        e, Y = eigh(R.mT @ self.weigh(R))  # C in the orthonormal basis of the row space
        return LowRankEigen(self.unweighted(), vectors @ Y, torch.where(e.abs() > _noise(e), e, torch.zeros_like(e)), d.new_zeros(()))

    @property
    def noise(self) -> int:
        per_matrix = self.rank if self.weights is None else min(self.rank, self.size)
        return self.batch.numel() * per_matrix

    def _colour(self, Z: Tensor) -> Tensor:
        if self.weights is None:
            return self.right(Z.reshape(*self.batch, self.rank, -1))
        eigen = self.spectral()
        root = eigen.values.clamp(min=0).sqrt().unsqueeze(-1)
        return self.right(eigen.vectors @ (root * Z.reshape(*self.batch, root.shape[-2], -1)))

    def _check_weights(self) -> None:
        lead = (*self.batch, self.rank)
        for name, tensor, shapes in (
            ("weights", self.weights, (lead, (*lead, self.rank))),
            ("gram", self._known_gram, ((*lead, self.rank),)),
        ):
            if tensor is not None and tuple(tensor.shape) not in shapes:
                raise ValueError(f"{name} of {self.rank} rows have shape {' or '.join(map(str, shapes))}, not {tuple(tensor.shape)}.")

    def _extra_fields(self) -> dict[str, Tensor]:
        return {name: t for name, t in (("weights", self.weights), ("gram", self._known_gram)) if t is not None}


def _noise(d: Tensor) -> Tensor:
    return d.shape[-1] * torch.finfo(d.dtype).eps * d.abs().amax(-1, keepdim=True)
