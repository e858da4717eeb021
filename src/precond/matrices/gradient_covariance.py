"""The covariance of gradients by example."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context


@REGISTRY.register("gradient_covariance")
@dataclass(frozen=True, kw_only=True)
class GradientCovariance(Matrix):
    """Gradient covariance: (1/N) sum_i (g_i - gbar)(g_i - gbar)^T = empirical_fisher - gbar gbar^T, gbar the mean over examples.

    What is averaged over batches and steps is the second moment and the mean; the centring comes after. N is the
    number of terms (1 in its place for a sum-reduced loss). Cost: none beyond the training step. Source: Le Roux,
    Manzagol & Bengio, "Topmoumoute online natural gradient algorithm", 2008.

    >>> GradientCovariance().centred
    True
    """

    supplies = ("columns", "product")
    needs = "nothing beyond the training step"

    @property
    def true_gradient(self) -> bool:
        return True

    @property
    def centred(self) -> bool:
        return True

    def cotangents(self, context: Context) -> Tensor:
        return context.likelihood.gradient(context.output, context.target).unsqueeze(0)
