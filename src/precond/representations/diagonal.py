"""The diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Distribution, Gradient, Kind, Observation, Probes, Product
from precond.operators import Diagonal as DiagonalOperator
from precond.operators import Fit, FitName, Operator
from precond.representations.base import (
    REGISTRY,
    Representation,
    Statistics,
    mean_gradient,
    product_columns,
    refuse_kind,
    weighted_gradients,
    zeros,
)
from precond.representations.centring import deviation, first_moment
from precond.representations.estimates import Estimator, estimate
from precond.representations.fitted import PROBES
from precond.representations.secant import over_pairs
from precond.representations.unshared import unshared_rows
from precond.statistics import Stat


@REGISTRY.register("diagonal")
@dataclass(frozen=True, kw_only=True)
class Diagonal(Representation):
    """diag(C), exact: (scale) sum_ik u_ik^2, with the square outside the sum over positions.

    Without shared positions it is (g^2)^T a^2 and no gradient by example is formed. From products (Hessian) it takes
    one product a parameter. Memory P. Every parameter tensor is a block of its own.

    Args:
        estimator: "exact": the above. From `samples` products C v in all, with v drawn over all parameters: "hutchinson": the mean of
            v o (C v), whose expectation is diag(C), and which is diag(C) where C is diagonal and v of signs (Sophia-H). "row_norms": the
            root of the mean over samples and history of (C v)^2, whose expectation is diag(C^2) (equilibrated SGD; AdaHessian, where v
            is of signs and |C v| = |v o (C v)|).
        distribution: of v: "rademacher", signs, or "normal".
        spatial_average: of "row_norms": |C v| is first averaged over the dimensions of a kernel, as AdaHessian does: over the last two of
            a tensor of order 4, the last of one of order 2 or 3, none of a vector.

    Sources of the estimates: Bekas, Kokiopoulou & Saad 2007; Dauphin, de Vries & Bengio, "Equilibrated adaptive learning rates", 2015; Yao et
    al. (AdaHessian) 2021; Liu et al. (Sophia) 2024.

    >>> Diagonal().scope, Diagonal(estimator="hutchinson", samples=2).requests
    ('tensor', ('pairs',))
    """

    scope = "tensor"
    structure = DiagonalOperator

    estimator: Literal["exact", "hutchinson", "row_norms"] = "exact"
    samples: int = 1
    distribution: Distribution = "rademacher"
    spatial_average: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in ("exact", *get_args(Estimator)):
            raise ValueError(f"Diagonal(estimator={self.estimator!r}): choose 'exact', 'hutchinson' or 'row_norms'.")
        if self.distribution not in get_args(Distribution):
            raise ValueError(f"Diagonal(distribution={self.distribution!r}): choose 'rademacher' or 'normal'.")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"Diagonal(samples={self.samples!r}): a whole number of products, at least 1.")
        if self.spatial_average and self.estimator != "row_norms":
            raise ValueError("Diagonal(spatial_average=True) averages |C v|, which is positive: use it with estimator='row_norms'.")

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]
        return ("columns", "gradient", "product", "secant", "successive") if self.estimator == "exact" else ("pairs",)

    @property
    def followed(self) -> tuple[Kind, ...]:  # type: ignore[override]
        return PROBES if self.estimator == "exact" else ()

    @property
    def fit(self) -> FitName | None:  # type: ignore[override]
        return "diagonal"

    @property
    def centres(self) -> bool:  # type: ignore[override]
        return self.estimator == "exact"

    @property
    def definite(self) -> bool:
        return self.estimator == "row_norms"

    def centring(self) -> Mapping[str, Stat]:
        return super().centring() if self.estimator == "exact" else {}

    def over(self, kind: Kind) -> Representation:
        return over_pairs(self, kind, "entries") if self.estimator == "exact" else self

    def fits(self, block: Block) -> tuple[Fit, ...]:
        return (Fit((block.n,), ("diagonal",)),)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {"diagonal": Stat("mean", degree=2 if self.estimator == "row_norms" else 1, form="diagonal")}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if isinstance(observation, Probes) and self.estimator != "exact":
            v, Cv = (block.gather(x, lead=1) for x in observation.draw(self.distribution, self.samples))
            return {"diagonal": estimate(self.estimator, v, Cv, block.shape if self.spatial_average else None)}
        if isinstance(observation, Gradient):
            return {"diagonal": mean_gradient(observation, block).square()}
        if isinstance(observation, Columns):
            return {"diagonal": _from_columns(observation, block)} | first_moment(observation, block)
        if not isinstance(observation, Product):
            raise refuse_kind(self, observation)
        diagonal = zeros(block, block.n)
        for indices, rows in product_columns(observation, block):
            diagonal[indices] = rows[torch.arange(len(indices)), indices]
        return {"diagonal": diagonal}

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        if self.estimator == "row_norms":
            return DiagonalOperator(statistics["diagonal"].sqrt())
        mean = deviation(statistics)
        return DiagonalOperator(statistics["diagonal"] if mean is None else statistics["diagonal"] - mean.square())

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return block.n * itemsize


def _from_columns(observation: Columns, block: Block) -> Tensor:
    unshared = unshared_rows(observation, block) if len(block.parameters[0].shape) > 1 else None
    if unshared is not None:
        return torch.stack([(g.square().T @ a.square()).flatten() for g, a in unshared]).sum(0)
    total = zeros(block, block.n)
    for rows in weighted_gradients(observation, block):
        total = total + rows.square().sum(0)
    return total
