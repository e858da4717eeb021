"""Normalisation layers: the input is recomputed to x_hat, never divided out of the output (which breaks at gamma = 0)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from precond.layers.base import Rule, layer_grad, layer_input, rule_for
from precond.observe import LayerColumns, Tensors


class ScaleShift(Rule):
    """y = gamma x_hat + beta coordinate by coordinate: dgamma_i = sum over positions of g x_hat, dbeta_i = sum of g."""

    joint = True
    elementwise = True

    @abstractmethod
    def normalised(self, seen: LayerColumns) -> Tensor:
        """x_hat, in the shape of the input."""

    @abstractmethod
    def positions(self, seen: LayerColumns) -> tuple[int, ...]:
        """The dimensions of the input that share the parameters, apart from the examples."""

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        g = layer_grad(seen)[:, examples]
        shared = tuple(d + 1 for d in self.positions(seen))
        out: Tensors = {}
        if "weight" in names:
            product = g * self.normalised(seen)[examples]
            out["weight"] = product.sum(shared) if shared else product
        if "bias" in names:
            out["bias"] = g.sum(shared) if shared else g
        return out


@rule_for(nn.LayerNorm)
class LayerNorm(ScaleShift):
    """Normalises the last dimensions; everything between them and the examples is shared."""

    def normalised(self, seen: LayerColumns) -> Tensor:
        module = seen.module
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(layer_input(seen), module.normalized_shape, eps=module.eps)

    def positions(self, seen: LayerColumns) -> tuple[int, ...]:
        module = seen.module
        assert isinstance(module, nn.LayerNorm)
        return tuple(range(1, layer_input(seen).dim() - len(module.normalized_shape)))


@rule_for(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNorm(ScaleShift):
    """Normalises by the batch in training mode, by the running statistics otherwise; channels are dimension 1.

    In training mode the columns are those of one backward pass over the batch, cross-example terms included, as in
    every published K-FAC.
    """

    def normalised(self, seen: LayerColumns) -> Tensor:
        module, x = seen.module, layer_input(seen)
        assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        if seen.training or module.running_mean is None or module.running_var is None:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        return F.batch_norm(x, module.running_mean.to(x.dtype), module.running_var.to(x.dtype), training=False, eps=module.eps)

    def positions(self, seen: LayerColumns) -> tuple[int, ...]:
        return tuple(range(2, layer_input(seen).dim()))
