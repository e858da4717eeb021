"""What the likelihoods with independent outputs share: a term is a row, its event the last dimension."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from precond.likelihoods.base import Likelihood, full


class Elementwise(Likelihood):
    """Output and target of shape (*, K): each of the rows is a term and its K outputs are independent.

    torch's `mean` also averages over K, which multiplies the loss of a term by 1 / K: gradients carry 1 / K, curvature
    carries 1 / K, and so each column of S and each sample 1 / sqrt(K). A sum carries neither.
    """

    def event(self, output: Tensor) -> tuple[int, ...]:
        return (output.dim() - 1,) if output.dim() > 1 else ()

    def _per_output(self, output: Tensor) -> float:
        width = output.shape[-1] if output.dim() > 1 else 1
        return 1.0 / width if self.reduction == "mean" else 1.0

    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        width = output.shape[-1] if output.dim() > 1 else 1
        return torch.tensor(output.numel() // width, device=output.device)

    @abstractmethod
    def _curvature(self, output: Tensor) -> Tensor:
        """Second derivative of the loss of one output element, in the shape of `output`."""

    @abstractmethod
    def _residual(self, output: Tensor, target: Tensor) -> Tensor:
        """First derivative of the loss of one output element."""

    @abstractmethod
    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """First derivative at a target drawn from the model: mean zero, variance `_curvature`."""

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return self._residual(full(output), target.to(full(output).dtype)) * self._per_output(output)

    def factor(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        root = (self._curvature(full(output)) * self._per_output(output)).sqrt()
        if output.dim() <= 1:
            yield root
            return
        for c in range(output.shape[-1]):
            column = torch.zeros_like(root)
            column[..., c] = root[..., c]
            yield column

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        return self._draw(full(output), generator) * math.sqrt(self._per_output(output))

    def hessian_product(self, output: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        return self._curvature(full(output)) * self._per_output(output) * vector
