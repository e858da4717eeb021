"""The true columns: what the user's own backward pass left at the outputs of the layers."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.observe.observation import LayerColumns
from precond.observe.records import Forward


def true_columns(forward: Forward, backward: int, layers: frozenset[str], unit: Tensor) -> list[LayerColumns]:
    """What the user's backward pass left at the outputs of the layers, divided by `unit` to be per term and unscaled."""
    divisor = torch.where(unit == 0, torch.ones_like(unit), unit)  # a masked-out call: the gradient is zero as well

    def kept(slot: list[tuple[int, Tensor]]) -> Tensor | None:
        grads = [g for b, g in slot if b == backward]
        if not grads:
            return None
        grad = sum(grads[1:], grads[0])
        wide = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad  # scaled half precision is divided in float32
        return (wide / divisor.to(wide.dtype)).unsqueeze(0)

    return [call.columns([kept(slot) for slot in call.slots], forward.batch) for call in forward.calls if call.name in layers]
