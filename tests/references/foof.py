"""FOOF (Benzing 2022): D = G (A + damping I)^-1, A the mean of a a^T with the homogeneous 1, averaged with 0.95; SGD with momentum 0.9."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense_derived
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {"default": ({}, {}), "damping": ({"damping": 1.0}, {"damping": 1.0}), "interval_2": ({"solver_interval": 2}, {"interval": 2})}
STEPS = 12
TOLERANCE = 1e-10
CONTROLS = ({"beta": 0.9}, {"interval": 2})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.1, interval: int = 10, beta: float = 0.95
) -> Tensor:
    moments: list[Tensor] = []
    inverted: list[Tensor] = []

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        new = dense_derived.input_second_moment(model, network.criterion, *batch)  # I (x) A of every layer
        moments[:] = [beta * (moments[0] if moments else torch.zeros_like(new)) + (1 - beta) * new]
        if step % interval == 0:
            inverted[:] = [moments[0] / (1 - beta ** (step + 1)) + damping * torch.eye(len(new), dtype=new.dtype)]
        return torch.linalg.solve(inverted[0], gradient)

    return descend(network, batches, direction, lr=0.01, momentum=0.9)
