"""Hessian-free optimisation (Martens 2010): (GGN + damping I) d = g, by a dense solve, and by textbook CG on the dense matrix.

The recipe as it stands stops early, so that its direction depends on where CG starts (0.95 of the last solution) and when it stops
(residual below 1e-4 of |g|, or 50 products): "default" and "truncated" follow a CG written out here. With a tolerance of 1e-13 the
start no longer matters: "exact" is a dense solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "truncated": ({"solver": {"max_iterations": 4, "warm_start": 0.95}}, {"iterations": 4, "tolerance": 1e-10}),
    "cold": ({"solver": {"max_iterations": 4, "warm_start": 0.0}}, {"iterations": 4, "tolerance": 1e-10, "decay": 0.0}),
    "exact": ({"solver": {"tolerance": 1e-13, "warm_start": 0.95}}, {"exact": True}),
    "damping": ({"damping": 2.0}, {"damping": 2.0}),
}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"decay": 0.0}, {"tolerance": 1e-5})


def _cg(C: Tensor, b: Tensor, x: Tensor, tolerance: float, iterations: int) -> Tensor:
    r = b - C @ x
    d = r
    for _ in range(iterations):
        if r.norm() <= tolerance * b.norm():
            break
        alpha = (r @ r) / (d @ C @ d)
        x, new = x + alpha * d, r - alpha * C @ d
        d, r = new + (new @ new) / (r @ r) * d, new
    return x


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.1, iterations: int = 50, tolerance: float = 1e-4,
    decay: float = 0.95, exact: bool = False,
) -> Tensor:  # fmt: skip
    last: list[Tensor] = []

    def direction(model: torch.nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        C = dense.ggn(model, network.criterion, *batch) + damping * torch.eye(len(gradient), dtype=gradient.dtype)
        if exact:
            return torch.linalg.solve(C, gradient)
        start = decay * last[0] if last else torch.zeros_like(gradient)
        last[:] = [_cg(C, gradient, start, tolerance, iterations)]
        return last[0]

    return descend(network, batches, direction, lr=0.5)
