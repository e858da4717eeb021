"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from precond.errors import ObservationError
from precond.likelihoods import exact_column_chunks, exact_columns
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
        _refuse_indefinite(context)
        return exact_columns(context.likelihood, context.output, context.target, context.batch)

    def chunks(self, context: Context, limit: int) -> Iterator[Tensor]:
        _refuse_indefinite(context)
        yield from exact_column_chunks(context.likelihood, context.output, context.target, context.batch, limit)

    def frozen(self, context: Context) -> Tensor | None:
        _refuse_indefinite(context)
        return None

    def output_product(self, context: Context, frozen: Tensor | None, vector: Tensor) -> Tensor:
        return context.likelihood.hessian_product(context.output, context.target, vector)


def _refuse_indefinite(context: Context) -> None:
    if not context.likelihood.natural:
        raise ObservationError(
            f"the Hessian of the {context.likelihood.name!r} loss in its output depends on the target and can be indefinite, so there is no 'ggn' of "
            "it: use the matrix 'fisher'."
        )
