"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.errors import ObservationError
from precond.likelihoods import exact_column_chunks, exact_columns
from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context

Estimator = Literal["exact", "curvature_propagation"]


@REGISTRY.register("ggn")
@dataclass(frozen=True, kw_only=True)
class GGN(Matrix):
    """Generalised Gauss-Newton: (1/N) sum_i J_i^T (d^2 l_i / d f_i^2) J_i, exact or from random signs.

    estimator="exact" sends back every column of S, S S^T = d^2 l / d f^2. "curvature_propagation" sends back `samples`
    columns sum_c eps_c S_c / sqrt(samples), with independent signs eps = +-1 for every example, position and class
    c: unbiased for every number of samples, as E[eps eps^T] = I. Signs are keyed by (seed, step, criterion call, rank)
    and frozen for a whole solve. Scale: that of the loss as given. Cost: C columns (times the positions of an
    example), or `samples` columns, in one batched nested pass without weight gradients; a product costs about 1.6
    training steps by replay. Sources: Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", 2002; Martens, Sutskever & Swersky, "Estimating the Hessian by back-propagating curvature", 2012.

    >>> GGN(estimator="curvature_propagation", samples=2).samples
    2
    """

    supplies = ("columns", "product")
    needs = "the model's output distribution; first-order passes only"

    estimator: Estimator = "exact"
    samples: int = 1

    def __post_init__(self) -> None:
        if self.estimator not in get_args(Estimator):
            raise ValueError(f"GGN(estimator={self.estimator!r}): choose {' or '.join(repr(e) for e in get_args(Estimator))}.")
        if self.samples < 1 or (self.samples > 1 and self.estimator == "exact"):
            raise ValueError(
                f"GGN(samples={self.samples}): at least one column of signs is drawn, and only with estimator='curvature_propagation'."
            )

    def cotangents(self, context: Context) -> Tensor:
        refuse_indefinite(context, self.name)
        if self.estimator == "curvature_propagation":
            return _propagated(context, self.samples)
        return exact_columns(context.likelihood, context.output, context.target, context.batch)

    def chunks(self, context: Context, limit: int) -> Iterator[Tensor]:
        if self.estimator == "curvature_propagation":
            yield from super().chunks(context, limit)
            return
        refuse_indefinite(context, self.name)
        yield from exact_column_chunks(context.likelihood, context.output, context.target, context.batch, limit)

    def frozen(self, context: Context) -> Tensor | None:
        if self.estimator == "curvature_propagation":
            return self.cotangents(context)
        refuse_indefinite(context, self.name)
        return None

    def output_product(self, context: Context, frozen: Tensor | None, vector: Tensor) -> Tensor:
        if self.estimator == "curvature_propagation":
            return super().output_product(context, frozen, vector)
        return context.likelihood.hessian_product(context.output, context.target, vector)


def _propagated(context: Context, samples: int) -> Tensor:
    """(samples, *output.shape): sums over classes of the columns of S, each with a sign of its own at every term."""
    output, event = context.output, context.likelihood.event(context.output)
    terms = [1 if d in event else size for d, size in enumerate(output.shape)]
    total = output.new_zeros((samples, *output.shape), dtype=torch.promote_types(output.dtype, torch.float32))
    for column in context.likelihood.factor(output, context.target):
        total = total + column * _signs((samples, *terms), context.generator).to(column.dtype)
    return total / math.sqrt(samples)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Independent +1 and -1."""
    return 2 * torch.randint(2, tuple(shape), generator=generator, device=generator.device) - 1


def refuse_indefinite(context: Context, matrix: str) -> None:
    """Raise where the Hessian of a loss in its output has a sign that the likelihood does not fix."""
    if not context.likelihood.natural:
        raise ObservationError(
            f"the Hessian of the {context.likelihood.name!r} loss in its output depends on the target and can be indefinite, so there is no {matrix!r} of "
            "it: use the matrix 'fisher'."
        )
