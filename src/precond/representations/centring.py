"""Centring: the mean gradient is averaged beside the second moment, and its outer product is taken off after the average.

With rows of weight c_i, sum c_i (g_i - m)(g_i - m)^T = sum c_i g_i g_i^T - f f^T / n, f = sum c_i g_i, n = sum c_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns
from precond.representations.base import Statistics, zeros


def first_moment(observation: Columns, block: Block) -> Statistics:
    """{"first": sum c_i g_i (n,), "count": sum c_i}, or nothing where the observation is not centred."""
    if not observation.centred:
        return {}
    first = zeros(block, block.n)
    count = torch.zeros_like(observation.weight)
    for part in observation.parts:
        weight = part.share * part.scale
        count = count + weight * part.batch
        for gradients in block.gradients(part):
            first = first + gradients.sum((0, 1)) * weight.to(first.dtype)
    return {"first": first, "count": count}


def deviation(statistics: Statistics) -> Tensor | None:
    """The vector f / sqrt(n), whose outer product is to be taken off; None where nothing is centred."""
    if "first" not in statistics:
        return None
    first: Tensor = statistics["first"]
    count = statistics["count"].to(first.dtype)
    return first / torch.where(count > 0, count, torch.ones_like(count)).sqrt()
