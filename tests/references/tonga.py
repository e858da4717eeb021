"""TONGA (Le Roux, Manzagol & Bengio 2007) with dense matrices: (C + damping I) d = g, C <- gamma C + (1/N) sum_i g_i g_i^T.

With at least k + b rows C is replaced by its k largest eigenvalues before the next rows come, N of them a step, or one: the batch's gradient.
centred: the second moment less the outer product of the mean, both with the same weights. normalised: C divided by the sum of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
_SMALL, _COLUMNS = {"rank": 3, "gather": 4}, {"rank": 2, "gather": 2}
VARIANTS = {
    "default": ({}, {}),
    "small": ({"repr": _SMALL}, {"k": 3, "b": 4}),
    "one_gradient": ({"matrix": "batched_empirical_fisher", "repr": _COLUMNS}, {"matrix": "batch", "k": 2, "b": 2}),
    "centred": ({"matrix": "gradient_covariance", "repr": {"rank": 20, "gather": 8}}, {"matrix": "centred", "k": 20, "b": 8}),
    "normalised": ({"history": {"name": "Ema", "beta": 0.9}}, {"normalised": True, "gamma": 0.9}),
    "every_step": ({"repr": {"rank": 4, "gather": 0}}, {"k": 4, "b": 0}),
}
ONLY = {name: ("mlp",) for name in ("small", "centred", "normalised", "every_step")}
STEPS = 9
TOLERANCE = 1e-10
CONTROLS = ({"k": 4}, {"b": 20}, {"gamma": 0.99}, {"matrix": "batch"}, {"normalised": True}, {"late": False})


class _Block:
    """C of some coordinates."""

    def __init__(self, where: Tensor, k: int, b: int) -> None:
        self.where, self.k, self.b, self.rows = where, k, b, 0
        self.C, self.mean = torch.zeros(len(where), len(where), dtype=torch.float64), torch.zeros(len(where), dtype=torch.float64)

    def truncate(self) -> None:
        values, vectors = torch.linalg.eigh(self.C)
        self.C = vectors[:, -self.k :] @ values[-self.k :].diag() @ vectors[:, -self.k :].T
        self.rows = min(self.k, self.rows, len(self.where))

    def take(self, rows: Tensor, gamma: float, late: bool) -> None:
        rows = rows[:, self.where]
        if late and self.b and self.rows >= self.k + self.b:
            self.truncate()
        self.C, self.mean = gamma * self.C + rows.T @ rows / len(rows), gamma * self.mean + rows.mean(0)
        self.rows += len(rows)
        if self.b == 0 or (not late and self.rows >= self.k + self.b):
            self.truncate()


def whole(model: nn.Module) -> list[Tensor]:
    return [torch.arange(sum(p.numel() for p in dense.parameters(model)))]


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, matrix: str = "examples", k: int = 5, b: int = 50, gamma: float = 0.995,
    normalised: bool = False, damping: float = 0.1, lr: float = 0.3, late: bool = True, units: bool = False,
) -> Tensor:  # fmt: skip
    """late: False truncates before the direction, which is wrong."""
    blocks: list[_Block] = []
    weight = 0.0

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        nonlocal weight
        weight = gamma * weight + 1
        blocks[:] = blocks or [_Block(where, k, b) for where in (dense.unit_indices(model) if units else whole(model))]
        rows = gradient.unsqueeze(0) if matrix == "batch" else dense.per_example_gradients(model, network.criterion, *batch)
        result = torch.zeros_like(gradient)
        for block in blocks:
            block.take(rows, gamma, late)
            C = block.C - torch.outer(block.mean, block.mean) / weight if matrix == "centred" else block.C
            C = C / weight if normalised else C
            g = gradient[block.where]
            result[block.where] = torch.linalg.solve(C + damping * torch.eye(len(g), dtype=g.dtype), g)
        return result

    return descend(network, batches, direction, lr=lr)
