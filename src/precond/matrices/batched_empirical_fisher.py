"""The outer product of the step's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from precond.matrices.base import REGISTRY, Matrix


@REGISTRY.register("batched_empirical_fisher")
@dataclass(frozen=True, kw_only=True)
class BatchedEmpiricalFisher(Matrix):
    """Batched empirical Fisher: N' g g^T with g the gradient of the step, after accumulation, all-reduce and clipping.

    scale=1: N' = 1. Of rank one each step; a history over steps makes it the second moment of the gradient (AdaGrad,
    RMSprop, Adam, Shampoo). scale="terms": N' = N, the number of terms of the step over micro-batches and ranks, so
    that where gradients of terms are independent with mean zero the expectation is that of `empirical_fisher`, whatever
    the batch size. With unequal weights c_i of the terms N is sum c_i / sum c_i^2, which is 1 for a sum-reduced loss and
    does not change with AMP's scale; two criteria on one forward pass form one term gradient. g is as the loop made it:
    the matrix scales with the square of what multiplies the loss. of="momentum": g is the vector that is preconditioned, which
    the transforms made of the gradient, such as a `Momentum` before the preconditioner (Muon); of one batch, the gradient.
    Cost: none; scale="terms" needs the criterion. Sources: Duchi, Hazan & Singer, "Adaptive subgradient methods", 2011; Jordan et
    al., "Muon", 2024.

    >>> BatchedEmpiricalFisher().needs_criterion, BatchedEmpiricalFisher(scale="terms").needs_criterion
    (False, True)
    """

    supplies = ("gradient",)
    needs = "nothing beyond the training step; no criterion either"

    scale: Literal[1, "terms"] = 1
    of: Literal["gradient", "momentum"] = "gradient"

    def __post_init__(self) -> None:
        if self.scale not in (1, "terms"):
            raise ValueError(f"BatchedEmpiricalFisher(scale={self.scale!r}): choose 1 or 'terms'.")
        if self.of not in ("gradient", "momentum"):
            raise ValueError(f"BatchedEmpiricalFisher(of={self.of!r}): choose 'gradient' or 'momentum'.")

    @property
    def counts_terms(self) -> bool:
        return self.scale == "terms"

    @property
    def of_momentum(self) -> bool:
        return self.of == "momentum"
