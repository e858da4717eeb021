"""For second derivatives: operations that torch 2.13 cannot differentiate twice (`embedding_bag`), or does so wrongly (`_weight_norm`).

Claims, checked by `test_layers_grid.py`: the values are torch's; the Hessian of a weight-normalised layer is symmetric and that of finite
differences.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import torch
import torch.nn.utils.weight_norm
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * g / v.square().sum([d for d in range(v.dim()) if d != dim], keepdim=True).sqrt()


def embedding_bag(
    index: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: None = None, norm_type: float = 2.0, by_freq: bool = False,
    mode: str = "mean", sparse: bool = False, weights: Tensor | None = None, last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """Bag by bag, entry by entry."""
    flat, shares = index.flatten(), [1.0] * index.numel() if weights is None else weights.flatten()
    starts = list(range(0, index.numel() + 1, index.shape[1])) if offsets is None else offsets.tolist() + ([] if last_offset else [len(index)])
    out = []
    for start, end in pairwise(starts):
        rows = [weight[flat[e]] * shares[e] for e in range(start, end) if flat[e] != padding_idx]
        if not rows:
            out.append(torch.zeros_like(weight[0]))
        elif mode == "max":
            out.append(torch.stack(rows).max(0).values)
        else:
            out.append(torch.stack(rows).sum(0) / (len(rows) if mode == "mean" else 1))
    return torch.stack(out)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Inside, modules call the functions above."""
    with (
        mock.patch.object(torch, "_weight_norm", weight_norm),
        mock.patch.object(sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", weight_norm),
        mock.patch.object(torch.nn.functional, "embedding_bag", embedding_bag),
    ):
        yield
