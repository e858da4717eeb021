"""LiSSA (Agarwal, Bullins & Hazan 2017) with one term a mini-batch: X <- g + (I - (H + damping I) / c) X from 0.99 of the X before, d = X / c.

c = 1.1 l by default, l the largest |Ritz value| of H + damping I plus its residual, in five dimensions from a fixed start; as c changes from batch
to batch it is X / c that is carried. "restarted" has more terms on one batch, from X = g, with nothing carried.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
import dense_krylov
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "linear")
VARIANTS = {
    "default": ({}, {}),
    "dense": ({"repr": "full"}, {}),
    "whole": ({"solver": {"warm_start": 1.0}}, {"carried": 1.0}),
    "scale": ({"solver": {"step_size": 0.1, "warm_start": 1.0}, "damping": 0.01}, {"scale": 10.0, "damping": 0.01, "carried": 1.0}),
    "terms": ({"solver": {"terms": 3}}, {"terms": 3}),
    "restarted": (
        {"solver": {"warm_start": 0.0, "terms": 30, "step_size": 0.1}, "damping": 1.0},
        {"carried": 0.0, "terms": 30, "scale": 10.0, "damping": 1.0},
    ),
}
# of a linear layer H has few distinct eigenvalues: once its Krylov space is exhausted the estimate of l is one of rounding
ONLY = {"default": ("mlp",), "whole": ("mlp",), "dense": ("mlp",), "scale": ("mlp", "linear"), "terms": ("mlp",), "restarted": ("mlp",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"carried": 0.0}, {"carried": 1.0}, {"terms": 2}, {"damping": 0.11}, {"iterations": 6})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.1, terms: int = 1, scale: float | None = None, iterations: int = 5,
    carried: float = 0.99,
) -> Tensor:  # fmt: skip
    last: list[Tensor] = []

    def direction(model: torch.nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        H = dense.hessian(model, network.criterion, *batch)
        C = H + damping * torch.eye(len(H), dtype=H.dtype)
        c = scale
        if c is None:
            start = torch.randn(len(H), generator=torch.Generator().manual_seed(0)).to(H.dtype)
            c = 1.1 * dense_krylov.largest_magnitude(C, start, iterations)
        while True:  # c is doubled where a residual is above all before the first term: a series that converges has none
            X = carried * c * last[0] if carried and last else gradient
            first, diverged = max(gradient.norm(), (gradient - C @ X / c).norm() if carried else gradient.norm()), False
            for _ in range(terms):
                diverged = diverged or bool((gradient - C @ X / c).norm() > 1.01 * first)
                X = gradient + X - C @ X / c
            if not diverged:
                break
            c = 2 * c
        last[:] = [X / c]
        return last[0]

    return descend(network, batches, direction, lr=0.3)
