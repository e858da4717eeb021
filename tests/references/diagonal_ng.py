"""The diagonal natural gradient: d = g / (diag F + damping), F <- 0.95 F + 0.05 F_t of the recorded labels, from zero, divided by 1 - 0.95^t."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F_

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "damping": ({"damping": 0.5}, {"damping": 0.5}),
    "local": ({"damping": 0.5, "history": "local"}, {"damping": 0.5, "beta": 0.0}),
}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"damping": 2e-2}, {"beta": 0.9})


def train(network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-2, beta: float = 0.95) -> Tensor:
    average = torch.zeros(())

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        nonlocal average
        output = dense.predict(model, batch[0])
        cotangents = (output.softmax(1) - F_.one_hot(drawn.labels[step], output.shape[1])).unsqueeze(0)
        average = beta * average + (1 - beta) * dense.project_diagonal(dense.fisher_mc(model, network.criterion, *batch, cotangents))
        F = average / (1 - beta ** (step + 1))
        return torch.linalg.solve(F + damping * torch.eye(len(gradient), dtype=gradient.dtype), gradient)

    return descend(network, batches, direction, lr=0.02)
