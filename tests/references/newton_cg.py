"""Newton-CG (Dembo & Steihaug 1983; Nocedal & Wright, algorithm 7.1) by textbook CG on the dense H + damping I.

It ends where |r| <= min(0.5, sqrt(|g|)) |g|, and where p^T (H + damping I) p <= 0: with the iterate so far, g itself at the first direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv", "linear")
VARIANTS = {
    "default": ({}, {}),
    "loose": ({"solver": {"tolerance": 0.99}}, {"tolerance": 0.99}),
    "constant": ({"solver": {"forcing": "constant", "tolerance": 1e-8}}, {"superlinear": False, "tolerance": 1e-8}),
    "indefinite": ({"damping": 1e-3, "solver": {"tolerance": 1e-3}}, {"damping": 1e-3, "tolerance": 1e-3}),
    "few": ({"solver": {"max_iterations": 2, "tolerance": 1e-6}}, {"iterations": 2, "tolerance": 1e-6}),
}
ONLY = {"loose": ("mlp",), "constant": ("mlp", "conv"), "indefinite": ("mlp",), "few": ("mlp",)}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"tolerance": 0.2}, {"damping": 0.31}, {"iterations": 1})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.3, tolerance: float = 0.5, superlinear: bool = True,
    iterations: int = 50,
) -> Tensor:  # fmt: skip
    def direction(model: torch.nn.Module, step: int, batch: Batch, g: Tensor) -> Tensor:
        C = dense.hessian(model, network.criterion, *batch) + damping * torch.eye(len(g), dtype=g.dtype)
        enough = min(tolerance, float(g.norm()) ** 0.5) if superlinear else tolerance
        z, r, p = torch.zeros_like(g), g, g
        for j in range(iterations):
            if r.norm() <= enough * g.norm():
                break
            if p @ C @ p <= 0:
                return g if j == 0 else z
            alpha = (r @ r) / (p @ C @ p)
            z, new = z + alpha * p, r - alpha * C @ p
            p, r = new + (new @ new) / (r @ r) * p, new
        return z

    return descend(network, batches, direction, lr=1.0)
