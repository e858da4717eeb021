"""Normalisation layers: the input is recomputed to x_hat, never divided out of the output (which breaks at gamma = 0)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from precond.layers.base import Rule, channel_input, channel_rows, layer_grad, layer_input, output_grad
from precond.layers.registration import register
from precond.observe import LayerColumns, Tensors


class ScaleShift(Rule):
    """y = gamma x_hat + beta coordinate by coordinate: dgamma_i = sum over positions of g x_hat, dbeta_i = sum of g."""

    joint = True
    elementwise = True

    @abstractmethod
    def normalised(self, seen: LayerColumns) -> Tensor:
        """x_hat, in the shape of the input."""


class LastDimensions(ScaleShift):
    """Normalises the last dimensions; everything between them and the examples is shared."""

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        g = layer_grad(seen)[:, examples]
        module = seen.module
        assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        shared = tuple(range(2, g.dim() - len(module.normalized_shape)))
        out: Tensors = {}
        if "weight" in names:
            product = g * self.normalised(seen)[examples]
            out["weight"] = product.sum(shared) if shared else product
        if "bias" in names:
            out["bias"] = g.sum(shared) if shared else g
        return out


@register(nn.LayerNorm)
class LayerNorm(LastDimensions):
    """x_hat = (x - mean) / sqrt(variance + eps) over the last dimensions."""

    def normalised(self, seen: LayerColumns) -> Tensor:
        module = seen.module
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(layer_input(seen), module.normalized_shape, eps=module.eps)


@register(nn.RMSNorm)
class RMSNorm(LastDimensions):
    """x_hat = x / sqrt(mean of x^2 + eps) over the last dimensions; there is no bias."""

    def normalised(self, seen: LayerColumns) -> Tensor:
        module = seen.module
        assert isinstance(module, nn.RMSNorm)
        return F.rms_norm(layer_input(seen), module.normalized_shape, eps=module.eps)


class Channels(ScaleShift):
    """Scales and shifts channels, dimension 1 of the input; everything behind them is shared."""

    def dims(self, module: nn.Module) -> Sequence[int]:
        """How many dimensions the input may have, the batch included."""
        return range(2, 6)

    def leading(self, seen: LayerColumns) -> int:
        return self.input(seen).shape[0]

    def input(self, seen: LayerColumns) -> Tensor:
        return channel_input(seen, self.dims(seen.module))

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        g = output_grad(seen)
        out: Tensors = {}
        if "weight" in names:
            out["weight"] = channel_rows(g * self.normalised(seen), seen)[:, examples]
        if "bias" in names:
            out["bias"] = channel_rows(g, seen)[:, examples]
        return out


def _by_running_statistics(x: Tensor, module: _NormBase) -> Tensor:
    assert module.running_mean is not None and module.running_var is not None
    return F.batch_norm(x, module.running_mean.to(x.dtype), module.running_var.to(x.dtype), training=False, eps=module.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNorm(Channels):
    """Normalises by the batch in training mode, by the running statistics otherwise.

    In training mode the columns are those of one backward pass over the batch, cross-example terms included, as in
    every published K-FAC.
    """

    def normalised(self, seen: LayerColumns) -> Tensor:
        module, x = seen.module, self.input(seen)
        assert isinstance(module, _NormBase)
        if seen.training or module.running_mean is None:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        return _by_running_statistics(x, module)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNorm(Channels):
    """Normalises each channel of each example; by running statistics where they are kept and the module is in eval mode."""

    def dims(self, module: nn.Module) -> Sequence[int]:
        return (3 if isinstance(module, nn.InstanceNorm1d) else 4 if isinstance(module, nn.InstanceNorm2d) else 5,)

    def normalised(self, seen: LayerColumns) -> Tensor:
        module, x = seen.module, self.input(seen)
        assert isinstance(module, _NormBase)
        if seen.training or module.running_mean is None:
            return F.instance_norm(x, eps=module.eps)
        return _by_running_statistics(x, module)


@register(nn.GroupNorm)
class GroupNorm(Channels):
    """Normalises groups of channels of each example over all positions."""

    def normalised(self, seen: LayerColumns) -> Tensor:
        module = seen.module
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(self.input(seen), module.num_groups, eps=module.eps)
