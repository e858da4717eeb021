"""Mini-block Fisher (Bahamou, Goldfarb & Ren 2023), tensor by tensor.

Of the mini-batch's gradient G, times N (or 1): a convolution's kernel (o, i) has F_oi of vec(G_oi) vec(G_oi)^T and
D_oi = (F_oi + l I)^-1 G_oi; a matrix has F of G^T G / out for all its rows ("own": each row one of its own), D = G (F + l I)^-1; a vector
its squares. F is copied at first, then F <- 0.9 F + 0.1 (new). SGD with momentum 0.9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "own": ({"repr": {"shared": "none"}}, {"own": True}),
    "plain_scale": ({"matrix": {"scale": 1}, "damping": 0.1}, {"terms": False, "damping": 0.1}),
    "interval_3": ({"solver_interval": 3, "damping": 0.1}, {"interval": 3, "damping": 0.1}),
    "warm": ({"start_step": 3, "before_start": "nothing", "history": {"schedule": "martens"}}, {"warm": 3}),
    "by_example": ({"matrix": "empirical_fisher"}, {"by_example": True}),
}
ONLY = {"own": ("mlp",), "interval_3": ("mlp",), "warm": ("conv",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"own": True}, {"terms": False}, {"interval": 2}, {"beta": 0.8}, {"damping": 0.02}, {"by_example": True}, {"copied": False})


def _blocks(rows: Tensor, own: bool) -> Tensor:
    """(blocks, n, n) of rows (m, *shape): sums over rows of outer products."""
    if rows.dim() == 3 and not own:
        return torch.einsum("moi,moj->ij", rows, rows).unsqueeze(0) / rows.shape[1]
    pieces = rows.unsqueeze(2) if rows.dim() == 2 else rows.flatten(3).flatten(1, 2) if rows.dim() > 3 else rows
    return torch.einsum("mbi,mbj->bij", pieces, pieces)


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-2, beta: float = 0.9, own: bool = False, terms: bool = True,
    interval: int = 1, warm: int = 0, by_example: bool = False, copied: bool = True,
) -> Tensor:  # fmt: skip
    """warm: so many steps average plainly and move nothing. copied: False starts the average from zero, which is wrong."""
    averages: dict[str, Tensor] = {}
    inverted: dict[str, Tensor] = {}

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        N = len(batch[0])
        rows = gradient[None] * (N if terms else 1) ** 0.5
        if by_example:
            rows = dense.per_example_gradients(model, network.criterion, *batch) / N**0.5
        pieces = []
        keep = min(1 - 1 / (step + 1), beta) if warm else beta if step or not copied else 0.0
        for name, u in dense.split(rows, model).items():
            new = _blocks(u, own)
            averages[name] = keep * averages.get(name, torch.zeros_like(new)) + (1 - keep) * new
            if step % interval == 0:
                inverted[name] = torch.linalg.inv(averages[name] + damping * torch.eye(new.shape[-1], dtype=new.dtype))
            G = dense.split(gradient, model)[name]
            pieces.append((inverted[name] @ G.reshape(-1, new.shape[-1], 1)).flatten())
        return torch.cat(pieces) if step >= warm else torch.zeros_like(gradient)

    return descend(network, batches, direction, lr=0.01, momentum=0.9)
