"""`nn.Conv2d`, with groups, stride, dilation and every padding mode."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from precond.layers.base import layer_grad, layer_input, rule_for
from precond.layers.linear import LinearRule
from precond.observe import LayerColumns


def pad_input(x: Tensor, module: nn.Conv2d) -> Tensor:
    """The input as the kernel reads it: padding is applied before patches are cut."""
    if isinstance(module.padding, str):
        total = [d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in module.padding]
    flat = [side for pair in reversed(sides) for side in pair]
    return F.pad(x, flat, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


@rule_for(nn.Conv2d)
class Conv2d(LinearRule):
    """A Linear layer on patches: a_ir is the patch that output position r reads, of length in / groups * prod(kernel)."""

    def inputs(self, seen: LayerColumns) -> Tensor:
        module, x = seen.module, layer_input(seen)
        assert isinstance(module, nn.Conv2d)
        patches = F.unfold(pad_input(x, module), module.kernel_size, dilation=module.dilation, stride=module.stride)
        return patches.reshape(x.shape[0], module.groups, -1, patches.shape[-1]).permute(1, 0, 3, 2)

    def outputs(self, seen: LayerColumns) -> Tensor:
        module, g = seen.module, layer_grad(seen)
        assert isinstance(module, nn.Conv2d)
        return g.reshape(*g.shape[:2], module.groups, module.out_channels // module.groups, -1).permute(0, 2, 1, 4, 3)
