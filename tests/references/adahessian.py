"""AdaHessian (Yao et al. 2021) with a dense Hessian, tensor by tensor.

D = |H v| for the recorded signs v, averaged over the last two dimensions of a tensor of order 4, the last of one of order 2 or 3;
m <- b1 m + (1 - b1) g, s <- b2 s + (1 - b2) D^2, d = (m / (1 - b1^t)) / ((s / (1 - b2^t))^(k/2) + eps); theta <- theta - lr d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "no_averaging": ({"repr": {"spatial_average": False}}, {"average": False}),
    "power_half": ({"solver": {"power": 0.5}}, {"k": 0.5}),
    "absolute": ({"matrix": "abs_hessian"}, {}),
    "every_2": ({"curvature_interval": 2}, {"interval": 2}),
}
ONLY = {name: ("mlp",) for name in ("no_averaging", "power_half", "absolute", "every_2")}
STEPS = 5
TOLERANCE = 1e-10
CONTROLS = ({"average": False}, {"k": 0.5}, {"eps": 1e-3}, {"interval": 2}, {"betas": (0.9, 0.99)})


def averaged(D: Tensor) -> Tensor:
    last = {1: (), 2: (1,), 3: (2,), 4: (2, 3)}[D.dim()]
    return D.mean(last, keepdim=True).expand_as(D) if last else D


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, average: bool = True, k: float = 1.0, eps: float = 1e-4, interval: int = 1,
    betas: tuple[float, float] = (0.9, 0.999), lr: float = 0.15,
) -> Tensor:  # fmt: skip
    probes = iter(drawn.probes)
    m: Tensor | float = 0.0
    s: Tensor | float = 0.0
    seen = 0

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        nonlocal m, s, seen
        if step % interval == 0:
            (v,) = next(probes)
            assert bool((v.abs() == 1).all())
            D = (dense.hessian(model, network.criterion, *batch) @ v).abs()
            if average:
                D = torch.cat([averaged(x).flatten() for x in dense.split(D, model).values()])
            s, seen = betas[1] * s + (1 - betas[1]) * D**2, seen + 1
        m = betas[0] * m + (1 - betas[0]) * gradient
        assert isinstance(s, Tensor)
        return m / (1 - betas[0] ** (step + 1)) / ((s / (1 - betas[1] ** seen)) ** (k / 2) + eps)

    return descend(network, batches, direction, lr=lr)
