"""Newton's method: d = (H + damping I)^-1 g, lr 1, by a dense solve.

The published damping of 1e-8 leaves H as it is, so it is run where H is regular (least squares): its first step lands on the minimum
of the batch. So is the recipe's; the networks, whose H is indefinite and singular, are run with more.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("linear", "mlp", "conv")
VARIANTS = {"default": ({}, {}), "published": ({"damping": 1e-8}, {"damping": 1e-8}), "damping": ({"damping": 3.0}, {"damping": 3.0})}
ONLY = {"default": ("linear",), "published": ("linear",)}
STEPS = 5
TOLERANCE = 1e-10
CONTROLS = ({"damping": 0.06},)


def train(network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.03) -> Tensor:
    def direction(model: torch.nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        H = dense.hessian(model, network.criterion, *batch)
        return torch.linalg.solve(H + damping * torch.eye(len(gradient), dtype=gradient.dtype), gradient)

    return descend(network, batches, direction, lr=1.0)
