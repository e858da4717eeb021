"""KFLR (Botev, Ritter & Barber 2017): K-FAC with the exact Gauss-Newton columns, B = (1/N) sum_ik g_ik g_ik^T, block by dense block.

A, B averaged from zero with 0.95, divided by 1 - 0.95^t; A_d = A + pi sqrt(damping) I, B_d = B + sqrt(damping) / pi I.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
import dense_kron
from references.common import Batch, Drawn, Network, descend
from references.kfac import _damped, _layers

NETS = ("mlp", "conv")
VARIANTS = {"default": ({}, {}), "damping": ({"damping": 1e-2}, {"damping": 1e-2}), "interval_3": ({"solver_interval": 3}, {"interval": 3})}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"beta": 0.9},)


def _columns(output: Tensor) -> Tensor:
    """(C, N, C): column k of S_i for cross entropy, S S^T = diag(p) - p p^T: sqrt(p_k) (e_k - p)."""
    p = output.softmax(1)
    eye = torch.eye(p.shape[1], dtype=p.dtype)
    return torch.stack([p[:, k : k + 1].sqrt() * (eye[k] - p) for k in range(p.shape[1])])


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.1, interval: int = 1, beta: float = 0.95
) -> Tensor:
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    inverted: dict[str, Tensor] = {}

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        columns, weight = _columns(dense.predict(model, batch[0])), 1 - beta ** (step + 1)
        result = torch.zeros_like(gradient)
        for name in _layers(model):
            B, A = dense_kron.kron_expand(model, network.criterion, *batch, columns, name)
            old = factors.get(name, (torch.zeros_like(B), torch.zeros_like(A)))
            factors[name] = (beta * old[0] + (1 - beta) * B, beta * old[1] + (1 - beta) * A)
            if step % interval == 0:
                inverted[name] = _damped(factors[name][0] / weight, factors[name][1] / weight, damping)
            where = dense.joint_indices(model, name)
            result[where] = torch.linalg.solve(inverted[name], gradient[where])
        return result

    return descend(network, batches, direction, lr=0.1)
