"""A Kronecker product of any number of factors."""

from __future__ import annotations

import math
from functools import cached_property, reduce
from typing import Any, Self

import torch
from torch import Tensor

from precond.operators.base import Operator, number
from precond.operators.dense import Dense
from precond.operators.diagonal import Diagonal
from precond.operators.kronecker_eigen import KroneckerEigen
from precond.operators.modes import mode_product, mode_products, outer


class Kronecker(Operator):
    """scale * F_1^e (x) ... (x) F_k^e, never formed.

    Args:
        factors: each a matrix (n_m, n_m), a stack of them (b, n_m, n_m), a vector (n_m,) standing for a diagonal, or any operator, such as
            a `LowRank` (a `Diagonal` is the only way to give a stack of diagonals). All have the same b or none has one; a stack is the
            block-diagonal of b Kronecker products.
        exponent: e, which is what lets a history average the factors of a geometric mean; a fractional one takes the factors as
            semi-definite.
        scale: a number, a 0-dim tensor, or (b,), one a product.

    Row-major vec: `Kronecker(B, A) @ W.flatten()` is `(B @ W @ A.T).flatten()`. Vectors are (b, n_1, ..., n_k), flattened; a product costs
    b prod(n) sum(n_m), or what the factors' own products do, and an exponent one eigendecomposition a factor, once. What needs the
    eigenvectors or a power of a factor that is neither dense nor diagonal forms it.

    >>> B, A, W = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, 5.0]), torch.ones(2, 2)
    >>> Kronecker(B, A) @ W.flatten()
    tensor([ 6., 10.,  3.,  5.])
    """

    def __init__(self, *factors: Tensor | Operator, exponent: float = 1.0, scale: float | Tensor = 1.0) -> None:
        if not factors:
            raise ValueError("Kronecker needs at least one factor.")
        self.factors = tuple(as_factor(F) for F in factors)
        self.exponent, self.scale = exponent, scale
        batches = {tuple(F.batch) for F in self.factors}
        if len(batches) > 1 or len(self.batch) > 1:
            raise ValueError(f"the factors of a Kronecker product have one common leading dimension or none, not {sorted(batches)}.")

    @property
    def batch(self) -> torch.Size:
        """(b,) for a stack, () for one product."""
        return self.factors[0].batch

    @property
    def sizes(self) -> tuple[int, ...]:
        """(n_1, ..., n_k)."""
        return tuple(F.size for F in self.factors)

    @property
    def n(self) -> int:
        return self.batch.numel() * math.prod(self.sizes)

    @property
    def _like(self) -> Tensor:
        return self.factors[0]._like

    def fields(self) -> dict[str, Any]:
        return {"factors": {str(m): F for m, F in enumerate(self.factors)}, "exponent": self.exponent, "scale": self.scale}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        return cls(*fields["factors"].values(), exponent=fields["exponent"], scale=fields["scale"])

    @cached_property
    def _raised(self) -> Kronecker:
        return Kronecker(*(matrices(F).power(self.exponent) for F in self.factors), scale=self.scale)

    def materialise(self) -> Kronecker:
        """The same operator with exponent 1: the factors are raised to it, the scale stays."""
        return self if self.exponent == 1 else self._raised

    def scaled(self, X: Tensor) -> Tensor:
        """Times the scale: X (b * m, ...)."""
        if isinstance(self.scale, Tensor) and self.scale.dim():
            return (X.reshape(len(self.scale), -1) * self.scale.to(X.dtype).unsqueeze(1)).reshape(X.shape)
        return X if isinstance(self.scale, float) and self.scale == 1 else self.scale * X

    def _matmul(self, V: Tensor) -> Tensor:
        X, waiting = V.reshape(self.batch.numel(), *self.sizes, -1), list[Tensor | None]()
        for mode, F in enumerate(self.materialise().factors):
            plain = isinstance(F, (Dense, Diagonal))
            waiting.append(_stack(F) if plain else None)
            X = X if plain else mode_product(F._matmul, X, mode + 1)
        return self.scaled(mode_products(waiting, X).reshape(self.n, -1))

    def to_dense(self) -> Tensor:
        # torch.kron refuses some strides, such as those that LAPACK leaves
        stacks = [torch.diag_embed(F.values) if isinstance(F, Diagonal) else F.matrix for F in map(matrices, self.materialise().factors)]
        groups = zip(*(F.reshape(-1, *F.shape[-2:]).contiguous() for F in stacks), strict=True)
        product: Tensor = torch.block_diag(*(reduce(torch.kron, group) for group in groups))
        return self.scaled(product)

    def diagonal(self) -> Tensor:
        return self.scaled(outer([F.block_diagonals().reshape(-1, F.size) for F in self.materialise().factors]).reshape(-1))

    def trace(self) -> Tensor:
        traces = [F.block_diagonals().sum(-1) for F in self.materialise().factors]
        total: Tensor = (self.scale * torch.stack(traces).prod(0)).sum()
        return total

    def spectral(self) -> KroneckerEigen:
        """The spectrum scale * prod d_m^e in the joint eigenbasis; one eigendecomposition a factor that is not diagonal."""
        parts = [matrices(F).spectral() for F in self.factors]
        values = [p.spectrum if self.exponent == 1 else p.spectrum.clamp(min=0).pow(self.exponent) for p in parts]
        return KroneckerEigen([p.bases[0] for p in parts], self.scaled(outer(values)))

    def _colour(self, Z: Tensor) -> Tensor:
        # (F_1 (x) F_2)^(1/2) = F_1^(1/2) (x) F_2^(1/2)
        return Kronecker(*self.factors, exponent=self.exponent / 2, scale=number(self.scale, self).sqrt())._matmul(Z)


def as_factor(F: Tensor | Operator) -> Operator:
    """An operator, from what `Kronecker` takes as a factor."""
    if isinstance(F, Operator):
        return F
    if isinstance(F, Tensor):
        return Diagonal(F) if F.dim() == 1 else Dense(F)
    raise TypeError(f"a factor of a Kronecker product is a tensor or an operator, not a {type(F).__name__}.")


def matrices(F: Operator) -> Dense | Diagonal:
    """A factor whose entries can be computed with: itself where it is dense or diagonal, else its matrix, formed."""
    if isinstance(F, (Dense, Diagonal)):
        return F
    if not F.batch:
        return Dense(F.to_dense())
    eye = torch.eye(F.size, dtype=F.dtype, device=F.device)
    return Dense(F._matmul(eye.repeat(F.batch.numel(), 1)).reshape(*F.batch, F.size, F.size))


def _stack(F: Operator) -> Tensor:
    """A dense or diagonal factor as `mode_products` takes it: (b, n, n) or (b, n)."""
    if isinstance(F, Diagonal):
        return F.values.reshape(-1, F.size)
    assert isinstance(F, Dense)
    return F.matrix.reshape(-1, F.size, F.size)
