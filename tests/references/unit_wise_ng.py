"""The natural gradient unit by unit (Kurita 1994): d_o = (F_oo + damping I)^-1 g_o for the row o of [W, b], F of the recorded labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F_

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {"default": ({}, {}), "damping": ({"damping": 0.5}, {"damping": 0.5})}
# at the published damping the convolutional network saturates within 6 steps: its softmax then rounds to one-hot
ONLY = {"default": ("mlp",)}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"damping": 2e-3},)


def train(network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-3) -> Tensor:
    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        output = dense.predict(model, batch[0])
        cotangents = (output.softmax(1) - F_.one_hot(drawn.labels[step], output.shape[1])).unsqueeze(0)
        F = dense.fisher_mc(model, network.criterion, *batch, cotangents)
        return torch.linalg.solve(dense.project_unit(F, model) + damping * torch.eye(len(gradient), dtype=gradient.dtype), gradient)

    return descend(network, batches, direction, lr=0.1)
