"""The same damping for every Kronecker factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.damping.base import Damping, plus
from precond.errors import InvalidCombination
from precond.operators import Dense, Diagonal, Kronecker, KroneckerSum, Operator
from precond.operators.base import number
from precond.operators.kronecker import matrices


@dataclass(frozen=True)
class PerFactor(Damping):
    """scale (F_1 + value I)^e (x) ... (x) (F_k + value I)^e: absolute, and inside the exponent.

    The damping of Shampoo (Gupta, Koren and Singer 2018), of TNT and of SINGD. In units of a factor, so that it does not see the scale of the
    product, and F -> c F is not balanced by another factor. The axes, or the terms, of a Kronecker sum are damped alike. Equal to `Tikhonov`
    on dense and diagonal operators.

    Args:
        only: the factors that are damped, counted from 0, or from the last with negative numbers; None for all. K-BFGS damps A, the second of
            B (x) A, and not B (Goldfarb, Ren & Bahamou 2020). Numbers that an operator does not have are passed over.
        balanced: the factors of a product first take its scale and one mean trace, F_m <- (c / w_m) F_m with w_m = tr(F_m) / n_m and
            c^k = scale^(1/e) prod w_m, which leaves the product as it is: the value then means the same to each of them (TNT). Where a w_m or
            the scale is not positive and finite, factors and scale stay as they are.

    Raises:
        InvalidCombination: the operator has no factors.

    >>> import torch
    >>> C = Kronecker(torch.tensor([3.0]), torch.tensor([8.0]), exponent=0.5)
    >>> PerFactor(1.0)(C).diagonal()
    tensor([6.])
    >>> [F.values.item() for F in PerFactor(1.0, balanced=True)(Kronecker(torch.tensor([1.0]), torch.tensor([4.0]), scale=4.0)).factors]
    [5.0, 5.0]
    """

    only: tuple[int, ...] | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.only, list):  # as a recipe has it
            object.__setattr__(self, "only", tuple(self.only))
        numbers = isinstance(self.only, tuple) and self.only and all(isinstance(m, int) and not isinstance(m, bool) for m in self.only)
        if self.only is not None and not numbers:
            raise ValueError(f"PerFactor(only={self.only!r}): it is a list of the numbers of factors, such as [1], or None for all.")

    def _damped(self, factors: Sequence[Operator]) -> list[Operator]:
        k = len(factors)
        chosen = range(k) if self.only is None else {m % k for m in self.only if -k <= m < k}
        return [plus(F, self.amount) if m in chosen else F for m, F in enumerate(factors)]

    def _damp(self, operator: Operator, power: float) -> Operator:
        if isinstance(operator, (Dense, Diagonal)):
            return operator.plus(self.amount)
        if isinstance(operator, Kronecker):
            operator = _balanced(operator) if self.balanced else operator
            return Kronecker(*self._damped(operator.factors), exponent=operator.exponent, scale=operator.scale)
        if isinstance(operator, KroneckerSum):
            terms = self._damped(operator.factors) if operator.factors else [self._damp(term, power) for term in operator.terms]
            return KroneckerSum(*terms, exponent=operator.exponent, scale=operator.scale)  # type: ignore[arg-type]  # each keeps its kind
        raise InvalidCombination(f"PerFactor damping needs Kronecker factors; for a {operator.kind} operator use Tikhonov.")


def _balanced(operator: Kronecker) -> Kronecker:
    """The same product, of factors that have one mean trace, and its scale."""
    factors = [matrices(F) for F in operator.factors]
    means = torch.stack([F.block_diagonals().mean(-1) for F in factors])  # (k, *batch)
    scale = number(operator.scale, operator).expand(means.shape[1:])
    usable = ((means > 0) & means.isfinite()).all(0) & (scale > 0) & scale.isfinite()
    logs, whole = (torch.where(usable, x, torch.ones_like(x)).log() for x in (means, scale))
    level = logs.mean(0) + whole / (operator.exponent * len(factors))  # through logarithms, so that no product overflows
    ratios = torch.where(usable, (level - logs).exp(), torch.ones_like(means))
    balanced = [_times(F, ratio) for F, ratio in zip(factors, ratios, strict=True)]
    return Kronecker(*balanced, exponent=operator.exponent, scale=torch.where(usable, torch.ones_like(scale), scale))


def _times(F: Dense | Diagonal, ratio: Tensor) -> Dense | Diagonal:
    """One number a matrix of a stack."""
    return Dense(F.matrix * ratio[..., None, None]) if isinstance(F, Dense) else Diagonal(F.values * ratio[..., None])
