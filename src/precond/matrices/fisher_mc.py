"""The Fisher information matrix from sampled labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context


@REGISTRY.register("fisher_mc")
@dataclass(frozen=True, kw_only=True)
class FisherMC(Matrix):
    """Monte-Carlo Fisher: `fisher` with the expectation over labels replaced by `samples` draws from the model.

    Each column is the gradient of -log p at drawn labels, divided by sqrt(samples), so the estimate is unbiased for
    every number of samples. Draws are keyed by (seed, step, criterion call, rank) and frozen for a whole solve.
    Scale: that of the loss as given. Cost: `samples` columns in one nested pass without weight gradients. Source:
    Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015.

    >>> FisherMC(samples=2).samples
    2
    """

    supplies = ("columns", "product")
    needs = "labels drawn from the model; first-order passes only"

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"FisherMC(samples={self.samples}): at least one label must be drawn.")

    def cotangents(self, context: Context) -> Tensor:
        draws = [context.likelihood.sample(context.output, context.target, context.generator) for _ in range(self.samples)]
        return torch.stack(draws) / math.sqrt(self.samples)
