"""Independent Bernoulli outputs: `nn.BCEWithLogitsLoss`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from precond.likelihoods.base import check_criterion
from precond.likelihoods.elementwise import Elementwise


class Bernoulli(Elementwise):
    """-y log p - (1 - y) log(1 - p) with p = sigmoid(f): curvature p (1 - p) for each output."""

    name = "bernoulli"
    criterion = nn.BCEWithLogitsLoss

    @classmethod
    def from_criterion(cls, criterion: nn.Module) -> Bernoulli:
        assert isinstance(criterion, nn.BCEWithLogitsLoss)
        check_criterion(criterion, {"weight": None, "pos_weight": None})
        return cls(criterion.reduction)

    def _curvature(self, output: Tensor) -> Tensor:
        return output.sigmoid() * (-output).sigmoid()

    def _residual(self, output: Tensor, target: Tensor) -> Tensor:
        return output.sigmoid() - target

    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        p = output.sigmoid()
        return p - torch.bernoulli(p, generator=generator)
