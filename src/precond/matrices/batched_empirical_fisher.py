"""The outer product of the step's gradient."""

from __future__ import annotations

from dataclasses import dataclass

from precond.matrices.base import REGISTRY, Matrix


@REGISTRY.register("batched_empirical_fisher")
@dataclass(frozen=True, kw_only=True)
class BatchedEmpiricalFisher(Matrix):
    """Batched empirical Fisher: g g^T with g the gradient of the step, after accumulation, all-reduce and clipping.

    Of rank one each step; a history over steps makes it the second moment of the gradient (AdaGrad, RMSprop, Adam,
    Shampoo). It scales with the square of the loss. Cost: none. Source: Duchi, Hazan & Singer, "Adaptive subgradient
    methods", 2011.

    >>> BatchedEmpiricalFisher().needs_criterion
    False
    """

    supplies = ("gradient",)
    needs = "nothing beyond the training step; no criterion either"
