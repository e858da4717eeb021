"""Preconditioners of an iterative solver: a function of the damped operator that gives an approximation of its inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.operators import Absolute, Diagonal, MatrixFree, Operator, Shifted

Preconditioner = Callable[[Operator], Operator]
"""Called at a refresh with the damped operator C; gives a definite operator P ~ C^-1 that can be packed (no function in it)."""


@dataclass(frozen=True)
class Jacobi:
    """diag(C)^(-exponent) of the damped C; 0.75 is Martens' choice (2010), 1 the classical one.

    A matrix-free operator that brings an estimate of its diagonal along (`representations.MatrixFree(diagonal=...)`) is taken at its word, and
    damped like the operator: Martens' (mean_i g_i^2 + damping)^(-3/4) with "empirical_fisher".

    Args:
        exponent: above 0.
        probes: of another matrix-free operator the diagonal costs n products; with a number here it is the mean of v * C v over as many fixed
            sign vectors v (Hutchinson), its absolute value where that is negative.

    >>> Jacobi(exponent=0.5)(Diagonal(torch.tensor([4.0, 16.0]))).diagonal()
    tensor([0.5000, 0.2500])
    """

    exponent: float = 0.75
    probes: int | None = None

    def __post_init__(self) -> None:
        if not self.exponent > 0 or (self.probes is not None and self.probes < 1):
            raise ValueError(f"Jacobi needs an exponent above 0 and at least 1 probe, not {self.exponent} and {self.probes}.")

    def __call__(self, damped: Operator) -> Operator:
        known = _estimate(damped)
        if known is not None:
            diagonal = known
        elif self.probes is None:
            diagonal = damped.diagonal()
        else:
            signs = torch.randint(0, 2, (damped.n, self.probes), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
            V = signs.to(damped.device, damped.dtype)
            diagonal = (V * (damped @ V)).mean(1)
        smallest = torch.finfo(diagonal.dtype).eps * diagonal.abs().amax()
        return Diagonal(diagonal.abs().clamp(min=smallest).pow(-self.exponent))


def _estimate(operator: Operator) -> Tensor | None:
    """What a matrix-free operator says of its diagonal, with what is added to it."""
    if isinstance(operator, Shifted):
        inner = _estimate(operator.operator)
        return None if inner is None else inner + operator.shift
    if isinstance(operator, Absolute):
        return _estimate(operator.operator)
    return operator.estimate if isinstance(operator, MatrixFree) else None
