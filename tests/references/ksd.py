"""Krylov subspace descent (Vinyals & Povey 2012) with the quadratic model of the batch: d = V (V^T C V + damping I)^-1 V^T g.

V is an explicit orthonormal basis of g, C g, ..., C^(k - 1) g and of the direction before; the first step has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
import dense_krylov
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "few": ({"solver": {"steps": 3}}, {"steps": 3}),
    "no_previous": ({"solver": {"steps": 3, "previous_direction": False}}, {"steps": 3, "previous": False}),
    "hessian": ({"matrix": "hessian", "damping": 0.5, "solver": {"steps": 4}}, {"hessian": True, "damping": 0.5, "steps": 4}),
}
ONLY = {"no_previous": ("mlp",), "hessian": ("mlp",)}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"steps": 5}, {"damping": 0.031}, {"hessian": True})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.03, steps: int = 20, previous: bool = True, hessian: bool = False
) -> Tensor:
    last: list[Tensor] = []

    def direction(model: torch.nn.Module, step: int, batch: Batch, g: Tensor) -> Tensor:
        C = (dense.hessian if hessian else dense.ggn)(model, network.criterion, *batch)
        V = dense_krylov.basis(C, g, steps)
        if previous and last:
            V = dense_krylov.widened(V, last[0], 1e-12 * float(last[0].norm()))
        last[:] = [V @ torch.linalg.solve(V.T @ C @ V + damping * torch.eye(V.shape[1], dtype=g.dtype), V.T @ g)]
        return last[0]

    return descend(network, batches, direction, lr=0.3)
