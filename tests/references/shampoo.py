"""Shampoo (Gupta, Koren & Singer 2018): a dense Kronecker product of the inverse 2k-th roots for every parameter tensor.

F_m = eps I + sum_t G_(m) G_(m)^T, one factor a dimension, eps once, at the start; D = (F_1^(-1/2k) (x) ... (x) F_k^(-1/2k)) vec G
with roots of every T-th step (every step in the paper); a vector has the one factor F^(-1/2); then SGD with momentum 0.9.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
_CALM = {"initial": 1e-2}  # a `Sum`; old roots of a small eps make a chaotic trajectory, where rounding grows to 1e-9 in 12 steps
VARIANTS = {
    "default": ({}, {}),
    "interval_4": ({"solver_interval": 4, "history": _CALM}, {"interval": 4, "eps": 1e-2}),
    "interval_10": ({"solver_interval": 10, "history": _CALM}, {"interval": 10, "eps": 1e-2}),
    "curvature_every_3": ({"curvature_interval": 3, "solver_interval": 3, "history": _CALM}, {"interval": 3, "observe": 3, "eps": 1e-2}),
}
STEPS = 12
TOLERANCE = 1e-10
CONTROLS = ({"interval": 2}, {"eps": 2e-4})


def _inverse_root(F: Tensor, degree: int) -> Tensor:
    values, vectors = torch.linalg.eigh(F)
    return vectors @ torch.diag(values ** (-1.0 / degree)) @ vectors.T


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, interval: int = 1, observe: int = 1, eps: float = 1e-4, lr: float = 0.1
) -> Tensor:
    factors: dict[str, list[Tensor]] = {}
    roots: dict[str, Tensor] = {}

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        pieces = []
        for name, G in dense.split(gradient, model).items():
            if name not in factors:
                factors[name] = [eps * torch.eye(n, dtype=G.dtype) for n in G.shape]
            if step % observe == 0:
                for m, n in enumerate(G.shape):
                    unfolded = G.movedim(m, 0).reshape(n, -1)
                    factors[name][m] = factors[name][m] + unfolded @ unfolded.T
            if step % interval == 0:
                roots[name] = functools.reduce(torch.kron, [_inverse_root(F, 2 * G.dim()) for F in factors[name]])
            pieces.append(roots[name] @ G.flatten())
        return torch.cat(pieces)

    return descend(network, batches, direction, lr=lr, momentum=0.9)
