"""FANG (Grosse & Salakhutdinov 2015): the dense network of a graph, and a dense solve.

F <- 0.95 F + 0.05 F_t from zero, divided by 1 - 0.95^t, F_t from the recorded labels; C the network of F + damping I on the graph in which
a weight has the bias of its unit for parent; d = C^-1 g.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
import dense_sparse
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "damping": ({"damping": 0.5}, {"damping": 0.5}),
    "unit": ({"repr": {"pattern": "unit"}}, {"pattern": "unit"}),
    "band": ({"repr": {"pattern": "band", "width": 3}}, {"pattern": "band", "width": 3}),
    "interval_2": ({"solver_interval": 2, "history": {"beta": 0.5}}, {"interval": 2, "beta": 0.5}),
}
ONLY = {"unit": ("mlp",), "band": ("mlp",), "interval_2": ("mlp",)}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"pattern": "diagonal"}, {"beta": 0.9}, {"damping": 2e-2})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-2, beta: float = 0.95, interval: int = 1,
    pattern: str = "bias", width: int = 1,
) -> Tensor:  # fmt: skip
    average, weight, seen = torch.zeros(()), 0.0, iter(drawn.labels)
    held: list[Tensor] = []

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        nonlocal average, weight
        output = dense.predict(model, batch[0])
        cotangents = (output.softmax(1) - F.one_hot(next(seen), output.shape[1])).unsqueeze(0)
        average = beta * average + (1 - beta) * dense.fisher_mc(model, network.criterion, *batch, cotangents)
        weight = beta * weight + 1 - beta
        if step % interval == 0:
            damped = average / weight + damping * torch.eye(len(gradient), dtype=gradient.dtype)
            held[:] = [dense_sparse.network(damped, dense_sparse.parents(model, pattern, width))]
        return torch.linalg.solve(held[0], gradient)

    return descend(network, batches, direction, lr=0.1)
