"""Damping: an object maps an operator to a damped operator, whose dense matrix is what a solver must invert."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from precond.errors import InvalidCombination
from precond.operators import BlockDiagonal, Dense, Diagonal, Kronecker, Operator, RootShifted, Shifted
from precond.operators.base import number

SMALLEST = 1e-8
"""Where there is no damping, the first boost starts at this multiple of the mean of the diagonal."""


@dataclass(frozen=True)
class Damping(ABC):
    """A rule that makes an operator safe to invert.

    Args:
        value: at least 0 and finite: a number, or a 0-dim tensor where it changes from step to step.

    A new rule writes `_damp`, and `boosted` where `value` is not what a failing refresh should raise.

    Raises:
        ValueError: the value is negative or not finite.
    """

    value: float | Tensor
    keeps_eigenvectors: ClassVar[bool] = False
    """Whether the damped operator has the eigenvectors of the operator, so that a solver that has them may damp the spectrum alone."""

    def __post_init__(self) -> None:
        if isinstance(self.value, Tensor):
            if self.value.dim() != 0:
                raise ValueError(f"damping is a number or a 0-dim tensor, not a tensor of shape {tuple(self.value.shape)}.")
            if self.value.device.type != "cpu":
                return  # reading it would stop the host on every step
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"damping must be finite and at least 0, not {float(self.value)}: give a small positive number such as 1e-3.")

    def __call__(self, operator: Operator, power: float = 1.0) -> Operator:
        """The damped operator; `power` is that of the solver, which takes its inverse to this power."""
        if isinstance(operator, BlockDiagonal):
            return operator.with_blocks({name: self(block, power) for name, block in operator.blocks.items()})
        return self._damp(operator, power)

    @abstractmethod
    def _damp(self, operator: Operator, power: float) -> Operator:
        """The damped operator of one that is not block-diagonal."""

    def boosted(self, factor: float, operator: Operator) -> Self:
        """More of the same, for a refresh that failed: `factor` times the value, and 1e-8 times the mean diagonal where the value is 0."""
        if bool(self.value == 0):
            return replace(self, value=SMALLEST * _mean_diagonal(operator))
        return replace(self, value=self.value * factor)


@dataclass(frozen=True)
class Tikhonov(Damping):
    """C + value I, inside the power.

    >>> Tikhonov(0.5)(Diagonal(torch.ones(2))).diagonal()
    tensor([1.5000, 1.5000])
    """

    keeps_eigenvectors: ClassVar[bool] = True

    def _damp(self, operator: Operator, power: float) -> Operator:
        if not isinstance(self.value, Tensor) and self.value == 0:
            return operator
        if isinstance(operator, (Dense, Diagonal)):
            return operator.plus(self.value)
        if isinstance(operator, Shifted):
            return Shifted(operator.operator, operator.shift + self.value)
        return Shifted(operator, self.value)


@dataclass(frozen=True)
class Outside(Damping):
    """(C^p + value I)^(1/p) for a solver of power p, so that what is applied is (C^p + value I)^(-1): Adam, RMSprop, AdaGrad, SOAP.

    The same as `Tikhonov` for p = 1.

    >>> Outside(1.0)(Diagonal(torch.tensor([4.0])), power=0.5).diagonal()
    tensor([9.])
    """

    keeps_eigenvectors: ClassVar[bool] = True

    def _damp(self, operator: Operator, power: float) -> Operator:
        if power == 1 or (not isinstance(self.value, Tensor) and self.value == 0):
            return Tikhonov(self.value)(operator)
        if operator.live:
            raise InvalidCombination("a matrix-free operator has no eigendecomposition for Outside damping with a power: use Tikhonov.")
        return RootShifted(operator, self.value, power)


@dataclass(frozen=True)
class Factored(Damping):
    """Damping of each factor of a Kronecker operator, whose product stays a Kronecker product.

    With w_m = tr(F_m) / n_m, c = (prod w_m)^(1/k) and l = value / scale, factor m becomes F_m + l^(1/k) (w_m / c) I.
    For two factors, B (x) A, that is (B + sqrt(l) / pi I) (x) (A + pi sqrt(l) I) with pi^2 = (tr A / dim A) / (tr B / dim B)
    (Martens and Grosse 2015, section 6.3, arXiv 1503.05671). It exceeds C + value I by a positive semi-definite matrix.
    Where a mean trace is not positive and finite, w_m / c is 1. Equal to `Tikhonov` on dense and diagonal operators.

    Args:
        pi: False: w_m / c is 1.

    Raises:
        InvalidCombination: the operator is neither Kronecker nor dense nor diagonal.

    >>> C = Kronecker(torch.tensor([1.0]), torch.tensor([4.0]))
    >>> [F.values.item() for F in Factored(1.0)(C).factors]
    [1.5, 6.0]
    """

    pi: bool = True

    def _damp(self, operator: Operator, power: float) -> Operator:
        if isinstance(operator, (Dense, Diagonal)):
            return operator.plus(self.value)
        if not isinstance(operator, Kronecker):
            raise InvalidCombination(f"Factored damping needs Kronecker factors; for a {operator.kind} operator use Tikhonov.")
        operator = operator.materialise()
        k = len(operator.factors)
        level = (number(self.value, operator) / number(operator.scale, operator)) ** (1 / k)
        shifts = level * self._balance(operator)
        return Kronecker(*(F.plus(shift) for F, shift in zip(operator.factors, shifts, strict=True)), scale=operator.scale)

    def _balance(self, operator: Kronecker) -> Tensor:
        """w_m / c, (k, *batch), through logarithms, so that no product of traces overflows."""
        means = torch.stack([F.block_diagonals().mean(-1) for F in operator.factors])
        if not self.pi:
            return torch.ones_like(means)
        usable = ((means > 0) & means.isfinite()).all(0)
        logs = torch.where(usable, means, torch.ones_like(means)).log()
        return (logs - logs.mean(0)).exp()


def _mean_diagonal(operator: Operator) -> Tensor:
    """Of a matrix-free operator, only the mean over one fixed direction: its diagonal would cost n products."""
    if operator.live:
        ones = torch.ones(operator.n, dtype=operator.dtype, device=operator.device)
        return operator.quadratic_form(ones).abs() / operator.n
    return operator.trace().abs() / operator.n


def resolve(value: float | Tensor | Damping, natural: type[Damping]) -> Damping:
    """A damping object, from one or from a number, which becomes the object natural to the cell.

    >>> resolve(1e-3, Tikhonov)
    Tikhonov(value=0.001)
    """
    if isinstance(value, Damping):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"damping is a number or an object of precond.damping, not a {type(value).__name__}.")
    return natural(value)
