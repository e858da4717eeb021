"""The empirical Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context


@REGISTRY.register("empirical_fisher")
@dataclass(frozen=True, kw_only=True)
class EmpiricalFisher(Matrix):
    """Empirical Fisher: (1/N) sum_i g_i g_i^T, g_i the gradient of one example's summed terms at the true labels.

    N is the number of terms (1 is used in its place for a sum-reduced loss). Equal to `fisher` only in expectation,
    and only where the model is the data distribution. Cost: none beyond the training step, whose own backward pass
    gives the columns. Source: Kunstner, Balles & Hennig, "Limitations of the empirical Fisher approximation", 2019.

    >>> EmpiricalFisher().true_gradient
    True
    """

    supplies = ("columns", "product")
    needs = "nothing beyond the training step"

    @property
    def true_gradient(self) -> bool:
        return True

    def cotangents(self, context: Context) -> Tensor:
        return context.likelihood.gradient(context.output, context.target).unsqueeze(0)
