"""One-sided Shampoo (Xie et al. 2025): L <- L + G G^T over the shortest dimension of each tensor, D = (L + eps I)^(-1/2) G; SGD."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "damping": ({"damping": 1e-2}, {"eps": 1e-2}),
    "interval_2": ({"solver_interval": 2, "damping": 0.1}, {"interval": 2, "eps": 0.1}),
}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"eps": 2e-4},)


def train(network: Network, batches: list[Batch], drawn: Drawn, *, eps: float = 1e-4, interval: int = 1) -> Tensor:
    sums: dict[str, Tensor] = {}
    roots: dict[str, Tensor] = {}

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        pieces = []
        for name, G in dense.split(gradient, model).items():
            mode = min(range(G.dim()), key=lambda m: G.shape[m])
            moved = G.movedim(mode, 0)
            flat = moved.flatten(1) if G.dim() > 1 else moved.unsqueeze(1)
            sums[name] = sums.get(name, torch.zeros(len(flat), len(flat), dtype=G.dtype)) + flat @ flat.T
            if step % interval == 0:
                values, U = torch.linalg.eigh(sums[name])
                roots[name] = U @ torch.diag((values + eps) ** -0.5) @ U.T
            pieces.append((roots[name] @ flat).reshape(moved.shape).movedim(0, mode).flatten())
        return torch.cat(pieces)

    return descend(network, batches, direction, lr=0.1)
