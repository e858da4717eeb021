"""`nn.PReLU`: a slope of every channel, or one of all. The generic rule has to loop: torch's own batching rule of its gradient fails."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from precond.layers.base import Rule, channel_rows, output_grad, wide
from precond.layers.registration import register
from precond.observe import LayerColumns, Tensors


@register(nn.PReLU)
class PReLU(Rule):
    """y = max(x, 0) + w min(x, 0): dw_i = sum over positions of g min(x, 0)."""

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        module = seen.module
        assert isinstance(module, nn.PReLU)
        product = output_grad(seen) * wide(seen.input).clamp(max=0)
        rows = channel_rows(product if module.num_parameters > 1 else product.reshape(*product.shape[:2], 1, -1), seen)
        return {"weight": rows[:, examples]}
