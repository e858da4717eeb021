"""Eigenvalues raised to a smallest one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from precond.damping.base import Damping
from precond.errors import InvalidCombination
from precond.operators import Dense, Diagonal, Kronecker, KroneckerEigen, LowRankEigen, Operator, Spectral

Policy = Literal["clamp", "shift"]


@dataclass(frozen=True)
class Floor(Damping):
    """f(C), f applied to the eigenvalues d: a matrix whose smallest eigenvalue is at least the value, whatever the sign of those of C.

    policy="clamp": f(d) = max(d, value); "shift": f(d) = d - min(min d, 0) + value, which is what Distributed Shampoo does for roots of
    deficient factors (Shi et al. 2023, arXiv 2309.06497). The smallest eigenvalue is that of each matrix of a stack. Cost: an
    eigendecomposition a refresh, which a spectral solver has anyway.

    Args:
        factors: floor each factor of a Kronecker operator, inside its exponent, instead of the spectrum of the product; the result is again
            a Kronecker product, which the factorising solvers take.

    Raises:
        InvalidCombination: the operator has no eigendecomposition of its parts, or (factors) no factors.

    >>> import torch
    >>> C = Diagonal(torch.tensor([-1.0, 3.0]))
    >>> Floor(0.5)(C).diagonal(), Floor(0.5, policy="shift")(C).diagonal()
    (tensor([0.5000, 3.0000]), tensor([0.5000, 4.5000]))
    """

    policy: Policy = "clamp"
    factors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy not in get_args(Policy):
            raise ValueError(f"Floor(policy={self.policy!r}): choose one of {', '.join(map(repr, get_args(Policy)))}.")

    @property
    def keeps_eigenvectors(self) -> bool:
        return not self.factors

    def _damp(self, operator: Operator, power: float) -> Operator:
        if isinstance(operator, Dense):
            return self._dense(operator)
        if isinstance(operator, Diagonal):
            return Diagonal(self._floored(operator.values, 1))
        if not self.factors:
            return self._spectrum(operator.spectral())
        if not isinstance(operator, Kronecker):
            raise InvalidCombination(
                f"Floor(factors=True) needs Kronecker factors; for a {operator.kind} operator use Floor(factors=False)."
            )
        factors = [self._damp(F, power) for F in operator.factors]
        return Kronecker(*factors, exponent=operator.exponent, scale=operator.scale)

    def _dense(self, operator: Dense) -> Dense:
        spectral = self._spectrum(operator.spectral())
        assert isinstance(spectral, KroneckerEigen)
        (U,) = spectral.bases
        assert U is not None
        matrix = (U * spectral.spectrum.unsqueeze(-2)) @ U.mT
        return Dense(((matrix + matrix.mT) / 2).reshape(operator.matrix.shape))

    def _spectrum(self, spectral: Spectral) -> Spectral:
        if self.policy == "clamp":
            return spectral.map(lambda s: s.clamp(min=self.amount))
        if isinstance(spectral, LowRankEigen):  # its map sees the spectrum in two pieces
            least = spectral.spectrum.amin().clamp(max=0)
            return spectral.map(lambda s: s - least + self.amount)
        return spectral.map(lambda s: self._floored(s, s.dim() - 1))

    def _floored(self, values: Tensor, dims: int) -> Tensor:
        """Of a stack of spectra, each in the last `dims` dimensions."""
        if self.policy == "clamp":
            return values.clamp(min=self.amount)
        return values - values.amin(tuple(range(-dims, 0)), keepdim=True).clamp(max=0) + self.amount
