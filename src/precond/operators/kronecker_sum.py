"""Sums of Kronecker products, and the Kronecker sum of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from precond.errors import InvalidCombination
from precond.operators.base import Operator, number
from precond.operators.dense import Dense
from precond.operators.diagonal import Diagonal
from precond.operators.kronecker import Kronecker, as_factor, matrices
from precond.operators.kronecker_eigen import KroneckerEigen


class KroneckerSum(Operator):
    """C_1 + ... + C_t of `Kronecker` operators, or of matrices one an axis, scale (sum_m I (x) F_m^e (x) I)^(1/e).

    Args:
        terms: all `Kronecker` operators of one shape, whose sum it is; or all factors (as `Kronecker` takes them), one an axis: two of
            them with exponent 1 are the Kronecker sum F_1 (x) I + I (x) F_2.
        exponent: e, for factors only. With scale k^(-1/e) it is a power mean over k axes: with e = -1/(2k) the matrix whose power -1/2
            is the preconditioner of CASPR (Duvvuri et al. 2024).
        scale: a number or a 0-dim tensor.

    A product costs as many as its terms. Factors have a joint eigenbasis, one eigendecomposition each; a sum of general terms has none.
    A sample is a sum of samples of the terms, where these are semi-definite.

    >>> KroneckerSum(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])).diagonal()
    tensor([11., 21., 12., 22.])
    """

    def __init__(self, *terms: Kronecker | Tensor | Dense | Diagonal, exponent: float = 1.0, scale: float | Tensor = 1.0) -> None:
        products = [t for t in terms if isinstance(t, Kronecker)]
        factors = [matrices(as_factor(t)) for t in terms if not isinstance(t, Kronecker)]
        if not terms or (products and factors):
            raise ValueError("KroneckerSum takes Kronecker operators, whose sum it is, or factors, one an axis: at least one, of one kind.")
        if exponent == 0 or (products and exponent != 1):
            raise ValueError(
                f"KroneckerSum takes an exponent other than 0 with factors, one an axis, and none with products; not {exponent}."
            )
        shapes = {(tuple(t.batch), t.sizes) for t in products}
        if len(shapes) > 1:
            raise ValueError(f"the terms of a KroneckerSum have one batch and one set of sizes, not {sorted(shapes)}.")
        self.factors, self.exponent, self.scale = tuple(factors), exponent, scale
        self.terms = tuple(products) if products else _along_axes(factors)

    @property
    def n(self) -> int:
        return self.terms[0].n

    @property
    def _like(self) -> Tensor:
        return self.terms[0]._like

    def fields(self) -> dict[str, Any]:
        terms: tuple[Operator, ...] = self.factors or self.terms
        return {"terms": {str(m): t for m, t in enumerate(terms)}, "exponent": self.exponent, "scale": self.scale}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        terms: Mapping[str, Kronecker | Dense | Diagonal] = fields["terms"]
        return cls(*terms.values(), exponent=fields["exponent"], scale=fields["scale"])

    def materialise(self) -> KroneckerSum | KroneckerEigen:
        """The same operator without exponents, so that a product needs no eigendecomposition."""
        if self.exponent != 1:
            return self._eigen
        return KroneckerSum(*(t.materialise() for t in self.terms), scale=self.scale) if not self.factors else self

    def _matmul(self, V: Tensor) -> Tensor:
        if self.exponent != 1:
            return self._eigen._matmul(V)
        return self.scale * sum((t._matmul(V) for t in self.terms[1:]), self.terms[0]._matmul(V))

    def diagonal(self) -> Tensor:
        if self.exponent != 1:
            return self._eigen.diagonal()
        return self.scale * torch.stack([t.diagonal() for t in self.terms]).sum(0)

    def trace(self) -> Tensor:
        if self.exponent != 1:
            return self._eigen.trace()
        return self.scale * torch.stack([t.trace() for t in self.terms]).sum()

    @cached_property
    def _eigen(self) -> KroneckerEigen:
        k = len(self.factors)
        parts = [F.spectral() for F in self.factors]
        axes = [p.spectrum.reshape(len(p.spectrum), *[1] * m, -1, *[1] * (k - 1 - m)) for m, p in enumerate(parts)]
        if self.exponent == 1:
            return KroneckerEigen([p.bases[0] for p in parts], self.scale * sum(axes[1:], axes[0]))
        powers = [s.clamp(min=0).pow(self.exponent) for s in axes]
        return KroneckerEigen([p.bases[0] for p in parts], self.scale * sum(powers[1:], powers[0]).pow(1 / self.exponent))

    def spectral(self) -> KroneckerEigen:
        if not self.factors:
            raise InvalidCombination(
                "a sum of Kronecker products has no eigendecomposition of its factors: use a solver that needs products only, such as 'cg', "
                "or Dense(operator.to_dense())."
            )
        return self._eigen

    @property
    def noise(self) -> int:
        return self.n if self.exponent != 1 else sum(t.noise for t in self.terms)

    def _colour(self, Z: Tensor) -> Tensor:
        if self.exponent != 1:
            return self._eigen._colour(Z)
        parts = [t._colour(z) for t, z in zip(self.terms, Z.split([t.noise for t in self.terms]), strict=True)]
        return number(self.scale, self).sqrt() * sum(parts[1:], parts[0])


def _along_axes(factors: list[Dense | Diagonal]) -> tuple[Kronecker, ...]:
    """I (x) F_m (x) I for each factor."""
    ones = [Diagonal(F._like.new_ones(*F.batch, F.size)) for F in factors]
    return tuple(Kronecker(*(F if axis == m else ones[axis] for axis, F in enumerate(factors))) for m in range(len(factors)))
