"""One-sided Shampoo (Xie et al. 2025; ASGO, An et al. 2025): L over the shortest dimension of each tensor, D = (L + eps I)^(-1/2) M; SGD.

L <- 0.95 L + 0.05 G G^T and M <- 0.9 M + 0.1 G from zero, divided by 1 - 0.95^t and 1 - 0.9^t; or the sum of all G G^T.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "damping": ({"damping": 1e-2}, {"eps": 1e-2}),
    "sum": ({"history": {"name": "Sum"}, "transforms": [], "damping": 1e-4}, {"beta": None, "momentum": 0.0, "eps": 1e-4}),
    "interval_2": ({"solver_interval": 2, "damping": 0.1}, {"interval": 2, "eps": 0.1}),
}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"eps": 2e-6}, {"beta": 0.9}, {"momentum": 0.8})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, eps: float = 1e-6, interval: int = 1, beta: float | None = 0.95, momentum: float = 0.9
) -> Tensor:
    moments: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    roots: dict[str, Tensor] = {}
    old, new = (1.0, 1.0) if beta is None else (beta, 1 - beta)

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        pieces = []
        for name, G in dense.split(gradient, model).items():
            mode = min(range(G.dim()), key=lambda m: G.shape[m])
            flat = _flat(G, mode)
            moments[name] = old * moments.get(name, torch.zeros(len(flat), len(flat), dtype=G.dtype)) + new * flat @ flat.T
            averages[name] = momentum * averages.get(name, torch.zeros_like(G)) + (1 - momentum) * G
            if step % interval == 0:
                values, U = torch.linalg.eigh(moments[name] / (1.0 if beta is None else 1 - beta ** (step + 1)))
                roots[name] = U @ torch.diag((values + eps) ** -0.5) @ U.T
            M = averages[name] / (1 - momentum ** (step + 1))
            moved = M.movedim(mode, 0)
            pieces.append((roots[name] @ _flat(M, mode)).reshape(moved.shape).movedim(0, mode).flatten())
        return torch.cat(pieces)

    return descend(network, batches, direction, lr=0.1)


def _flat(G: Tensor, mode: int) -> Tensor:
    """(n_mode, rest)."""
    moved = G.movedim(mode, 0)
    return moved.flatten(1) if G.dim() > 1 else moved.unsqueeze(1)
