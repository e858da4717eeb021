"""The short cut for layers without shared positions: gradients by example are g a^T, and need not be formed."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns


def unshared_rows(observation: Columns, block: Block) -> list[tuple[Tensor, Tensor]] | None:
    """(g (m, out), a (m, in')) for each part and column, weights folded into g; None where positions are shared.

    In the order of the block's coordinates: (a, g) where the weight is stored input first.
    """
    pairs = []
    for part in observation.parts:
        calls = list(block.calls(part))
        if len(calls) != 1 or not calls[0][0].rule.linear:
            return None
        layer, seen = calls[0]
        if layer.parameters.get("weight") not in block.names:  # a bias alone, beside a frozen weight
            return None
        rows = layer.rule.rows(seen)
        if not isinstance(rows.a, Tensor) or rows.a.shape[0] > 1 or rows.a.shape[2] > 1:
            return None
        layer.rule.check(seen)
        a, g = rows.a[0, :, 0], rows.g[:, 0, :, 0]
        if block.homogeneous:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        g = g * (part.share * part.scale).abs().sqrt().to(g.dtype)
        g, a = g.flatten(0, 1), a.repeat(len(g), 1)
        pairs.append((a, g) if rows.input_first and not block.transposed else (g, a))
    return pairs
