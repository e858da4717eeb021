"""Newton's method layer by layer: d_l = (H_ll + damping I)^-1 g_l, lr 1, by a dense solve. As with Newton's, the networks take more damping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("linear", "mlp", "conv")
VARIANTS = {"default": ({}, {}), "published": ({"damping": 1e-8}, {"damping": 1e-8}), "damping": ({"damping": 3.0}, {"damping": 3.0})}
ONLY = {"default": ("linear",), "published": ("linear",)}
STEPS = 5
TOLERANCE = 1e-10
CONTROLS = ({"damping": 0.06},)


def train(network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.03) -> Tensor:
    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        H = dense.project_layer(dense.hessian(model, network.criterion, *batch), model)
        return torch.linalg.solve(H + damping * torch.eye(len(gradient), dtype=gradient.dtype), gradient)

    return descend(network, batches, direction, lr=1.0)
