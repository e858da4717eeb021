"""The Fisher information matrix, exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from precond.likelihoods import exact_column_chunks, exact_columns
from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context


@REGISTRY.register("fisher")
@dataclass(frozen=True, kw_only=True)
class Fisher(Matrix):
    """Fisher information: (1/N) sum_i E_{y ~ p(.|f_i)} [grad log p grad log p^T], the expectation in closed form.

    Equal to `ggn` for the likelihoods whose output is the natural parameter (categorical logits, Bernoulli logits, the
    mean of a normal), with which it shares its columns: the covariance of d log p / d f is there the Hessian of the
    loss. Scale: that of the loss as given. Cost: as `ggn`. Source: Amari, "Natural gradient works efficiently in
    learning", 1998.

    >>> Fisher().supplies
    ('columns', 'product')
    """

    supplies = ("columns", "product")
    needs = "the model's output distribution; first-order passes only"

    def cotangents(self, context: Context) -> Tensor:
        return exact_columns(context.likelihood, context.output, context.target, context.batch)

    def chunks(self, context: Context, limit: int) -> Iterator[Tensor]:
        yield from exact_column_chunks(context.likelihood, context.output, context.target, context.batch, limit)

    def frozen(self, context: Context) -> Tensor | None:
        return None

    def output_product(self, context: Context, frozen: Tensor | None, vector: Tensor) -> Tensor:
        return context.likelihood.hessian_product(context.output, context.target, vector)
