"""Moments of layer outputs: the factor B where it is given, and is not made of columns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from precond.blocks import Block, Layer
from precond.observe import Factors, LayerColumns


def output_moment(observation: Factors, block: Block, *, summed: bool = False) -> Tensor | None:
    """B, (out, out) or (G, out, out); None where no layer of the block has an output moment.

    It is the sum over positions of the moment of each; summed: the moment of the sum over an example's positions.
    """
    assert observation.outputs is not None
    calls = {layer.name: (layer, seen) for part in observation.parts for layer, seen in block.calls(part)}
    moments = []
    for name, (layer, seen) in calls.items():
        if name not in observation.outputs:
            continue
        blocks = torch.diagonal(_by_rows(observation.outputs[name], layer, seen), dim1=0, dim2=3)  # (R, out, R, out, G)
        moments.append((blocks.sum((0, 2)) if summed else torch.diagonal(blocks, dim1=0, dim2=2).sum(-1)).movedim(2, 0))
    if not moments:
        return None
    total = torch.stack(moments).sum(0)
    return total.squeeze(0) if total.shape[0] == 1 else total


def _by_rows(moment: Tensor, layer: Layer, seen: LayerColumns) -> Tensor:
    """(*out, *out) in the layout of a layer's output to (G, R, out, G, R, out): groups, positions, channels."""
    ends = moment.shape[: moment.dim() // 2]
    for _ in range(2):  # one side after the other, as columns of one example
        columns = replace(seen, grads=(moment.reshape(-1, 1, *ends),), batch=1)
        rows = layer.rule.outputs(columns)  # (D, G, 1, R, out)
        moment = rows.flatten(1).T
    groups, positions, out = rows.shape[1], rows.shape[3], rows.shape[4]
    return moment.reshape(groups, positions, out, groups, positions, out)
