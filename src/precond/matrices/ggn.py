"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from precond.likelihoods import exact_columns
from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context


@REGISTRY.register("ggn")
@dataclass(frozen=True, kw_only=True)
class GGN(Matrix):
    """Generalised Gauss-Newton: (1/N) sum_i J_i^T (d^2 l_i / d f_i^2) J_i, exact.

    Scale: that of the loss as given. Cost: C columns (times the positions of an example) in one batched nested pass
    without weight gradients; a product costs about 1.6 training steps by replay. Source: Schraudolph, "Fast curvature
    matrix-vector products for second-order gradient descent", 2002.

    >>> GGN().definite
    True
    """

    supplies = ("columns", "product")
    needs = "the model's output distribution; first-order passes only"

    def cotangents(self, context: Context) -> Tensor:
        return exact_columns(context.likelihood, context.output, context.target, context.batch)

    def frozen(self, context: Context) -> Tensor | None:
        return None

    def output_product(self, context: Context, frozen: Tensor | None, vector: Tensor) -> Tensor:
        return context.likelihood.hessian_product(context.output, context.target, vector)
