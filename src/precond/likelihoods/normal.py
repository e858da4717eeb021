"""The normal distribution of fixed variance: `nn.MSELoss`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from precond.likelihoods.elementwise import Elementwise


class Normal(Elementwise):
    """(f - y)^2 = -log Normal(y; f, 1/2) up to a constant: curvature 2 for each output."""

    name = "normal"
    criterion = nn.MSELoss

    def _curvature(self, output: Tensor) -> Tensor:
        return torch.full_like(output, 2.0)

    def _residual(self, output: Tensor, target: Tensor) -> Tensor:
        return 2.0 * (output - target)

    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return math.sqrt(2.0) * torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
