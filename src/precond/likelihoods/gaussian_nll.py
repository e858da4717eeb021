"""The normal distribution of a variance that comes with the call: `nn.GaussianNLLLoss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.likelihoods.base import Likelihood
from precond.likelihoods.elementwise import Elementwise


class GaussianNLL(Elementwise):
    """(log v + (f - y)^2 / v) / 2 for each output, v = max(var, eps): curvature 1 / v in f.

    criterion(output, target, var): var is a number or a tensor that broadcasts as in torch. One that requires a gradient
    is an output of the model too, and the likelihood that of both: `GaussianMeanVariance`. `full` adds a constant.
    """

    name = "gaussian_nll"
    criterion = nn.GaussianNLLLoss

    def __init__(self, reduction: str = "mean", eps: float = 1e-6, var: Tensor | float | None = None) -> None:
        super().__init__(reduction)
        self.eps, self.var = eps, var

    @classmethod
    def from_criterion(cls, criterion: nn.Module) -> GaussianNLL:
        assert isinstance(criterion, nn.GaussianNLLLoss)
        return cls(criterion.reduction, criterion.eps)

    def given(self, output: Tensor, *arguments: Any) -> tuple[Likelihood, Tensor]:
        if len(arguments) != 1:
            raise ObservationError("the 'gaussian_nll' likelihood needs the variance: give the targets as the pair (target, var).")
        (var,) = arguments
        if isinstance(var, Tensor) and var.requires_grad:
            pair = (output, _laid_out(var, output).expand_as(output))
            both = torch.cat(pair, -1) if output.dim() > 1 else torch.stack(pair, -1)
            return GaussianMeanVariance(self.reduction, self.eps), both
        return type(self)(self.reduction, self.eps, var), output

    def _v(self, output: Tensor) -> Tensor:
        if self.var is None:
            raise ObservationError("the 'gaussian_nll' likelihood was given no variance: use `given(output, var)` first.")
        var = torch.as_tensor(self.var, dtype=output.dtype, device=output.device).detach()
        return _laid_out(var, output).clamp(min=self.eps).expand_as(output)

    def _curvature(self, output: Tensor) -> Tensor:
        return 1.0 / self._v(output)

    def _residual(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target) / self._v(output)

    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
        return noise / self._v(output).sqrt()

    def loss(self, criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        found: Tensor = criterion.forward(output, target, self.var)
        return found


class GaussianMeanVariance(Elementwise):
    """The same loss in (f, v), both made by the model; its output is [f, v] along the last dimension, (*, 2 K).

    Gradient ((f - y) / v, (1 - (f - y)^2 / v) / (2 v)), Fisher matrix diag(1 / v, 1 / (2 v^2)) for each output. The Hessian
    of the loss in (f, v) depends on the target and is indefinite, so that 'ggn' is no name for it. torch clamps v at
    eps but not its gradient, and so does this.
    """

    name = "gaussian_nll"
    natural = False

    def __init__(self, reduction: str = "mean", eps: float = 1e-6) -> None:
        super().__init__(reduction)
        self.eps = eps

    def _width(self, output: Tensor) -> int:
        return output.shape[-1] // 2

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = output.chunk(2, -1)
        return mean, var.clamp(min=self.eps)

    def _check(self, output: Tensor, target: Tensor) -> None:
        mean = output.chunk(2, -1)[0]
        super()._check(mean.squeeze(-1) if target.dim() == 1 else mean, target)

    def spread(self, output: Tensor, entries: Tensor) -> Tensor:
        one = entries.reshape(*output.shape[:-1], -1)
        return torch.cat([one, one], -1)

    def _curvature(self, output: Tensor) -> Tensor:
        _, v = self._split(output)
        return torch.cat([1.0 / v, 0.5 / v.square()], -1)

    def _residual(self, output: Tensor, target: Tensor) -> Tensor:
        mean, v = self._split(output)
        difference = mean - target.reshape(mean.shape)
        return torch.cat([difference / v, (1.0 - difference.square() / v) / (2.0 * v)], -1)

    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        mean, v = self._split(output)
        noise = torch.randn(mean.shape, dtype=output.dtype, device=output.device, generator=generator)
        return torch.cat([noise / v.sqrt(), (1.0 - noise.square()) / (2.0 * v)], -1)

    def loss(self, criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        mean, var = output.chunk(2, -1)
        found: Tensor = criterion.forward(mean.reshape(target.shape), target, var.reshape(target.shape))
        return found


def _laid_out(var: Tensor, output: Tensor) -> Tensor:
    """The variance so that it broadcasts against the output: torch also takes one a row."""
    return var.unsqueeze(-1) if var.dim() and var.shape != output.shape and var.shape == output.shape[:-1] else var
