"""Equilibrated SGD (Dauphin et al. 2015) with a dense Hessian: every T-th step S <- S + (H v)^2, c <- c + 1 for the recorded normal v;
d = g / (sqrt(S / c) + damping), and SGD with momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "interval_2": ({"curvature_interval": 2}, {"interval": 2}),
    "three_probes": ({"repr": {"samples": 3}, "curvature_interval": 2}, {"interval": 2}),
    "damping": ({"damping": 0.3}, {"damping": 0.3}),
    "absolute": ({"matrix": "abs_hessian", "curvature_interval": 3}, {"interval": 3}),
}
ONLY = {name: ("mlp",) for name in ("interval_2", "three_probes", "damping", "absolute")}
STEPS = 23  # the second refresh is that of step 21
TOLERANCE = 1e-10
CONTROLS = ({"last": 19}, {"damping": 0.02}, {"momentum": 0.0}, {"root": False})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, interval: int = 20, damping: float = 0.03, last: int | None = None,
    root: bool = True, lr: float = 0.03, momentum: float = 0.9,
) -> Tensor:  # fmt: skip
    """last: no refresh after this step; root: False takes the diagonal of the second moment itself. Both are wrong."""
    probes = iter(drawn.probes)
    S: Tensor | float = 0.0
    c = 0

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        nonlocal S, c
        if step % interval == 0 and (last is None or step <= last):
            vs = next(probes)
            H = dense.hessian(model, network.criterion, *batch)
            S, c = S + sum((H @ v) ** 2 for v in vs) / len(vs), c + 1
        mean = torch.as_tensor(S / c)
        return gradient / ((mean.sqrt() if root else mean) + damping)

    return descend(network, batches, direction, lr=lr, momentum=momentum)
