"""A spectrum in a Kronecker eigenbasis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from precond.operators.modes import mode_products
from precond.operators.spectral import Spectral


class KroneckerEigen(Spectral):
    """(U_1 (x) ... (x) U_k) diag(s) (U_1 (x) ... (x) U_k)^T, block-diagonal over a leading dimension b.

    Args:
        bases: per mode a stack of orthogonal matrices (b, n_m, n_m), eigenvectors in columns; (n_m, n_m) for b = 1; None is the identity.
        spectrum: (b, n_1, ..., n_k); (n_1, ..., n_k) for b = 1. Kept with the leading b.

    With the spectrum of a Kronecker product it is that product; with a spectrum of its own it is the corrected one of EKFAC (George et
    al. 2018, arXiv 1806.03884) and SOAP. A product costs 2 b prod(n) sum(n_m). Vectors are (b, n_1, ..., n_k), flattened row-major.

    >>> import torch
    >>> C = KroneckerEigen((None, torch.eye(2)), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> C.diagonal(), C.trace()
    (tensor([1., 2., 3., 4.]), tensor(10.))
    """

    def __init__(self, bases: Sequence[Tensor | None], spectrum: Tensor) -> None:
        if spectrum.dim() == len(bases):
            spectrum = spectrum.unsqueeze(0)
        if spectrum.dim() != len(bases) + 1:
            raise ValueError(f"{len(bases)} bases need a spectrum of as many dimensions, or one more, not {tuple(spectrum.shape)}.")
        self.bases = tuple(U.unsqueeze(0) if U is not None and U.dim() == 2 else U for U in bases)
        self.spectrum = spectrum
        for U, size in zip(self.bases, spectrum.shape[1:], strict=True):
            if U is not None and U.shape != (spectrum.shape[0], size, size):
                raise ValueError(f"a basis of shape {tuple(U.shape)} does not fit the spectrum of shape {tuple(spectrum.shape)}.")

    @property
    def n(self) -> int:
        return self.spectrum.numel()

    @property
    def _like(self) -> Tensor:
        return self.spectrum

    def fields(self) -> dict[str, Any]:
        # an identity basis has no tensor: the keys that are there say which modes have one
        return {"bases": {str(m): U for m, U in enumerate(self.bases) if U is not None}, "spectrum": self.spectrum}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        bases: Mapping[str, Tensor] = fields["bases"]
        return cls([bases.get(str(m)) for m in range(fields["spectrum"].dim() - 1)], fields["spectrum"])

    def map(self, function: Callable[[Tensor], Tensor]) -> KroneckerEigen:
        """f(C): the function applied to the spectrum."""
        return KroneckerEigen(self.bases, function(self.spectrum))

    def _matmul(self, V: Tensor) -> Tensor:
        X = mode_products(self.bases, V.reshape(*self.spectrum.shape, -1), transpose=True)
        return mode_products(self.bases, X * self.spectrum.unsqueeze(-1)).reshape(self.n, -1)

    def diagonal(self) -> Tensor:
        squares = [None if U is None else U.square() for U in self.bases]
        return mode_products(squares, self.spectrum.unsqueeze(-1)).reshape(-1)

    def trace(self) -> Tensor:
        return self.spectrum.sum()

    def logdet(self) -> Tensor:
        return self.spectrum.log().sum()
