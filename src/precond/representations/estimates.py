"""Estimates of a diagonal from products with random vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Estimator = Literal["hutchinson", "row_norms"]
_AVERAGED = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2}  # trailing dimensions, by the order of the tensor; two beyond


def estimate(estimator: Estimator, v: Tensor, Cv: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """The mean of v o (C v) over samples (m, n), or of (C v)^2; in float32 at least.

    shape: |C v| is first averaged over the trailing dimensions of a tensor of this shape.

    >>> import torch
    >>> v = torch.tensor([[1.0, -1.0]])
    >>> estimate("hutchinson", v, v * torch.tensor([2.0, 3.0]))
    tensor([2., 3.])
    """
    v, Cv = (x.float() if x.dtype.itemsize < 4 else x for x in (v, Cv))
    if estimator == "hutchinson":
        return (v * Cv).mean(0)
    if shape is not None:
        last = _AVERAGED.get(len(shape), 2)
        if last:
            sizes = tuple(shape)
            means = Cv.abs().view(-1, *sizes).flatten(-last).mean(-1, keepdim=True)
            Cv = means.expand(*means.shape[:-1], Cv[0].numel() // means[0].numel()).reshape(Cv.shape)
    return Cv.square().mean(0)
