"""KL-Shampoo (Lin et al. 2025): factors of gradients whitened along all other dimensions, applied as one dense Kronecker product.

F_m <- 0.95 F_m + 0.05 (G_(m) (x_{j != m} F_j^-1) G_(m)^T) / prod_{j != m} n_j with the other factors those of the last roots, I before the first
ones; D = ((F_1 + eps I)^(-1/2) (x) ... (x) (F_k + eps I)^(-1/2)) M; averages are divided by 1 - beta^t. A tensor is read as (out, rest).
The released code of Distributed Shampoo leaves the sizes n_j out and takes exponents 1/(2k), for which there is no fixed point.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "interval_3": ({"solver_interval": 3, "repr": {"whiten_interval": 3}}, {"interval": 3, "whiten": 3}),
    "eps": ({"damping": {"value": 0.1}, "repr": {"whiten_damping": 1e-2}}, {"eps": 0.1, "whiten_eps": 1e-2}),
    "order_3": ({"repr": {"merge_dims": "kernel", "whiten_interval": 4}}, {"kept": 2, "whiten": 4}),
    "sum": ({"history": {"name": "Mean"}}, {"beta2": None}),
}
ONLY = {"order_3": ("conv",), "eps": ("mlp",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"whiten": 2}, {"eps": 2e-3}, {"whiten_eps": 2e-3}, {"sizes": False}, {"plain": True}, {"beta1": 0.8})


def _root(F: Tensor, eps: float) -> Tensor:
    values, U = torch.linalg.eigh(F)
    return U @ torch.diag((values + eps) ** -0.5) @ U.T


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, eps: float = 1e-3, whiten_eps: float = 1e-3, interval: int = 1, whiten: int = 1,
    kept: int = 1, beta1: float = 0.9, beta2: float | None = 0.95, sizes: bool = True, plain: bool = False, lr: float = 1e-2,
) -> Tensor:  # fmt: skip
    """beta2: None is a plain mean. sizes: False leaves out the division, plain: True the whitening, which are other methods."""
    state: dict[str, dict[str, Any]] = {}

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        pieces = []
        for name, raw in dense.split(gradient, model).items():
            G = raw.reshape(*raw.shape[:kept], -1) if raw.dim() > kept else raw
            modes, eyes = range(G.dim()), [torch.eye(n, dtype=G.dtype) for n in G.shape]
            own = state.setdefault(name, {"F": [0 * e for e in eyes], "inverse": eyes, "M": 0 * G})
            if step and step % whiten == 0 and not plain:
                own["inverse"] = [torch.linalg.inv(F + whiten_eps * e) for F, e in zip(own["read"], eyes, strict=True)]
            keep = 1 - 1 / (step + 1) if beta2 is None else beta2
            for m, n in enumerate(G.shape):
                unfolded = G.movedim(m, 0).reshape(n, -1)
                one = torch.eye(1, dtype=G.dtype)
                between = functools.reduce(torch.kron, [own["inverse"][j] for j in modes if j != m], one)
                new = unfolded @ between @ unfolded.T / (G.numel() / n if sizes else 1)
                own["F"][m] = keep * own["F"][m] + (1 - keep) * new
            own["read"] = [F / (1 if beta2 is None else 1 - beta2 ** (step + 1)) for F in own["F"]]
            if step % interval == 0:
                own["P"] = functools.reduce(torch.kron, [_root(F, eps) for F in own["read"]])
            own["M"] = beta1 * own["M"] + (1 - beta1) * G
            pieces.append(own["P"] @ (own["M"] / (1 - beta1 ** (step + 1))).flatten())
        return torch.cat(pieces)

    return descend(network, batches, direction, lr=lr)
