"""The outer product of a gradient at sampled labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context


@REGISTRY.register("batched_fisher_mc")
@dataclass(frozen=True, kw_only=True)
class BatchedFisherMC(Matrix):
    """Batched Monte-Carlo Fisher: N g g^T, g the mean gradient at labels drawn from the model.

    Of rank one, and its expectation over labels is `fisher`, as the score has mean zero and examples are independent.
    With unequal weights c_i of the terms, N is sum c_i / sum c_i^2. Scale: that of the loss as given. Cost: one nested
    pass with weight gradients. Sources: Liu et al., "Sophia", 2023 (Sophia-G); Ren & Goldfarb, "Tensor normal
    training", 2021.

    >>> BatchedFisherMC().supplies
    ('gradient',)
    """

    supplies = ("gradient",)
    needs = "labels drawn from the model; first-order passes only"

    @property
    def sampled(self) -> bool:
        return True

    def cotangents(self, context: Context) -> Tensor:
        return context.likelihood.sample(context.output, context.target, context.generator).unsqueeze(0)
