"""Independent Bernoulli outputs: `nn.BCEWithLogitsLoss`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from precond.likelihoods.elementwise import Elementwise


class Bernoulli(Elementwise):
    """-w (v y log p + (1 - y) log(1 - p)) with p = sigmoid(f), for each output.

    w: `weight`, v: `pos_weight`, both broadcast against the output. With m = w (1 + (v - 1) y) the gradient is
    m p - w v y and the curvature m p (1 - p); a drawn label gives sqrt(m) (p - label). No mean divides by w or v.
    """

    name = "bernoulli"
    criterion = nn.BCEWithLogitsLoss

    def __init__(self, reduction: str = "mean", weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        super().__init__(reduction)
        self.weight, self.pos_weight = weight, pos_weight

    @classmethod
    def from_criterion(cls, criterion: nn.Module) -> Bernoulli:
        assert isinstance(criterion, nn.BCEWithLogitsLoss)
        return cls(criterion.reduction, criterion.weight, criterion.pos_weight)

    def _weights(self, output: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(w, v), in the dtype of the output."""
        weight, positive = (1.0 if t is None else t.detach().to(output) for t in (self.weight, self.pos_weight))
        return weight, positive

    def _mass(self, output: Tensor, target: Tensor) -> Tensor | float:
        weight, positive = self._weights(output)
        return weight if self.pos_weight is None else weight * (1.0 + (positive - 1.0) * target.detach().to(output))

    def _curvature(self, output: Tensor) -> Tensor:
        return output.sigmoid() * (-output).sigmoid()

    def _residual(self, output: Tensor, target: Tensor) -> Tensor:
        weight, positive = self._weights(output)
        return output.sigmoid() * self._mass(output, target) - weight * positive * target

    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        p = output.sigmoid()
        return p - torch.bernoulli(p, generator=generator)
