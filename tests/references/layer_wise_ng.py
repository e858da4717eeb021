"""The natural gradient layer by layer: d_l = (F_ll + damping I)^-1 g_l, F_ll the diagonal blocks of the exact Fisher of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "damping": ({"damping": 0.5}, {"damping": 0.5}),
    "interval_2": ({"curvature_interval": 2}, {"interval": 2}),
}
STEPS = 5
TOLERANCE = 1e-10
CONTROLS = ({"damping": 2e-3},)


def train(network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-3, interval: int = 1) -> Tensor:
    held: list[Tensor] = []

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        if step % interval == 0:
            held[:] = [dense.project_layer(dense.fisher(model, network.criterion, *batch), model)]
        return torch.linalg.solve(held[0] + damping * torch.eye(len(gradient), dtype=gradient.dtype), gradient)

    return descend(network, batches, direction, lr=0.1)
