"""What the likelihoods with independent outputs share: a term is a row, its event the last dimension."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from precond.errors import ObservationError
from precond.likelihoods.base import Likelihood, full


class Elementwise(Likelihood):
    """Output and target of shape (*, K): each of the rows is a term and its K outputs are independent.

    torch's `mean` also averages over K, which multiplies the loss of a term by 1 / K: gradients carry 1 / K, curvature
    carries 1 / K, and so each column of S and each sample 1 / sqrt(K). A sum carries neither. With reduction="none" an
    output's weight comes from the user's own mean and is measured against torch's, so that the same 1 / K is carried.
    """

    def _width(self, output: Tensor) -> int:
        """K: how many losses a term is the mean of."""
        return output.shape[-1] if output.dim() > 1 else 1

    def _per_output(self, output: Tensor) -> float:
        return 1.0 if self.reduction == "sum" else 1.0 / self._width(output)

    def _check(self, output: Tensor, target: Tensor) -> None:
        """Torch broadcasts targets with a warning at most; the loss is then over other terms than the rows of the output."""
        if output.shape != target.shape:
            raise ObservationError(
                f"the criterion was given an output of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)}, which broadcast: "
                "give them the same shape."
            )

    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        self._check(output, target)
        rows = (*output.shape[:-1], 1) if output.dim() > 1 else output.shape
        return torch.ones((), dtype=torch.bool, device=output.device).expand(rows)

    def _mass(self, output: Tensor, target: Tensor) -> Tensor | float:
        """The weight of an output's loss in its curvature, where the criterion has weights."""
        return 1.0

    @abstractmethod
    def _curvature(self, output: Tensor) -> Tensor:
        """Second derivative of the unweighted loss of one output element, in the shape of `output`."""

    @abstractmethod
    def _residual(self, output: Tensor, target: Tensor) -> Tensor:
        """First derivative of the weighted loss of one output element."""

    @abstractmethod
    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """First derivative at a target drawn from the model, unweighted: mean zero, variance `_curvature`."""

    def _weighted(self, output: Tensor, target: Tensor) -> Tensor:
        """The curvature of a term in each of its outputs."""
        return self._curvature(full(output)) * self._mass(full(output), target) * self._per_output(output)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return self._residual(full(output), target.detach().to(full(output).dtype)) * self._per_output(output)

    def factor(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        root = self._weighted(output, target).sqrt()
        if output.dim() <= 1:
            yield root
            return
        for c in range(output.shape[-1]):
            column = torch.zeros_like(root)
            column[..., c] = root[..., c]
            yield column

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        drawn = self._draw(full(output), generator) * math.sqrt(self._per_output(output))
        mass = self._mass(full(output), target)
        return drawn * (mass.sqrt() if isinstance(mass, Tensor) else math.sqrt(mass))

    def hessian_product(self, output: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        return self._weighted(output, target) * vector
