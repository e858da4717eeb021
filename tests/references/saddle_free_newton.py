"""Saddle-free Newton (Dauphin et al. 2014): d = V (|V^T H V| + damping I)^-1 V^T g, V an explicit basis of the Krylov space of H and g.

"dense": V = I, by eigenvalues of the whole H. "diagonal": g / (|diag H| + damping); "hutchinson": with the mean of v o H v over the recorded
probes v in place of the diagonal, and its absolute value after the mean.
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
    "few": ({"solver": {"steps": 6}}, {"steps": 6}),
    "dense": ({"repr": "full", "solver": "eigen"}, {"form": "dense"}),
    "diagonal": ({"repr": "diagonal", "solver": "elementwise", "damping": 0.1}, {"form": "diagonal", "damping": 0.1}),
    "hutchinson": (
        {"repr": {"name": "diagonal", "estimator": "hutchinson", "samples": 3}, "solver": "elementwise", "damping": 0.5},
        {"form": "hutchinson", "damping": 0.5},
    ),
}
ONLY = {"dense": ("mlp",), "diagonal": ("mlp",), "few": ("mlp", "linear"), "hutchinson": ("mlp",)}
STEPS = 5
TOLERANCE = 1e-10
CONTROLS = ({"steps": 4}, {"signed": True}, {"damping": 1.1e-2}, {"form": "diagonal"})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-2, steps: int = 20, form: str = "krylov", signed: bool = False
) -> Tensor:
    """signed: of H itself, which is Newton's method."""
    seen = iter(drawn.probes)

    def direction(model: torch.nn.Module, step: int, batch: Batch, g: Tensor) -> Tensor:
        H = dense.hessian(model, network.criterion, *batch)
        if form in ("diagonal", "hutchinson"):
            diagonal = H.diagonal()
            if form == "hutchinson":
                v = next(seen)
                diagonal = (v * (v @ H)).mean(0)
            return g / (diagonal.abs() + damping)
        V = torch.eye(len(g), dtype=g.dtype) if form == "dense" else dense_krylov.basis(H, g, steps)
        T = V.T @ H @ V
        values, vectors = torch.linalg.eigh((T + T.T) / 2)
        U = V @ vectors
        return U @ ((U.T @ g) / ((values if signed else values.abs()) + damping))

    return descend(network, batches, direction, lr=0.1)
