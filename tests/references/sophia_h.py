"""Sophia (Liu et al. 2024) in the paper's form, with dense matrices.

m <- b1 m + (1 - b1) g; at steps 1, k + 1, ... h <- b2 h + (1 - b2) h', both from 0 without correction, on the batch of the step and before its
update; theta <- (1 - lr wd) theta - lr clip(m / max(gamma h, eps), 1), entry by entry. Sophia-H: h' = v o (H v) for the recorded normal v.

At gamma = 0.01 nearly every entry is clipped in the first steps, so that the variants with gamma = 10 are those in which h counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, move, theta

NETS = ("mlp", "conv")
WIDE = [{"name": "Momentum", "beta": 0.96, "debias": False}, {"name": "Rescale", "factor": 0.1}, {"name": "ElementClip", "bound": 1.0}]
VARIANTS = {
    "default": ({}, {}),
    "wide": ({"transforms": WIDE, "damping": {"value": 1e-12}}, {"gamma": 10.0, "eps": 1e-11}),
    "wide_every_step": (
        {"transforms": WIDE, "damping": {"value": 0.01}, "curvature_interval": 1, "solver_interval": 1}, {"gamma": 10.0, "eps": 0.1, "k": 1}
    ),
    "signs": ({"repr": {"distribution": "rademacher"}, "transforms": WIDE}, {"gamma": 10.0, "eps": 1e-9}),
}
ONLY = {"wide_every_step": ("mlp",), "signs": ("mlp",)}
STEPS = 12  # the second refresh is that of step 11
TOLERANCE = 1e-10
CONTROLS = ({"betas": (0.9, 0.99)}, {"gamma": 10.0}, {"bound": 0.5})

Estimate = Callable[[nn.Module, Network, Batch, Drawn, int], Tensor]


def run(
    estimate: Estimate, network: Network, batches: list[Batch], drawn: Drawn, *, k: int, gamma: float, eps: float, betas: tuple[float, float],
    bound: float, lr: float, decay: float,
) -> Tensor:  # fmt: skip
    model, path = network.make(), []
    at = theta(model)
    m, h = torch.zeros_like(at), torch.zeros_like(at)
    for step, batch in enumerate(batches):
        m = betas[0] * m + (1 - betas[0]) * dense.gradient(model, network.criterion, *batch)
        if step % k == 0:
            h = betas[1] * h + (1 - betas[1]) * estimate(model, network, batch, drawn, step // k)
        ratio = m / torch.maximum(gamma * h, torch.full_like(h, eps))
        at = (1 - lr * decay) * at - lr * torch.minimum(torch.maximum(ratio, torch.full_like(m, -bound)), torch.full_like(m, bound))
        move(model, at)
        path.append(at.clone())
    return torch.stack(path)


def _hutchinson(model: nn.Module, network: Network, batch: Batch, drawn: Drawn, number: int) -> Tensor:
    (v,) = drawn.probes[number]
    return v * (dense.hessian(model, network.criterion, *batch) @ v)


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, k: int = 10, gamma: float = 0.01, eps: float = 1e-12,
    betas: tuple[float, float] = (0.96, 0.99), bound: float = 1.0, lr: float = 3e-3, decay: float = 0.0,
) -> Tensor:  # fmt: skip
    return run(_hutchinson, network, batches, drawn, k=k, gamma=gamma, eps=eps, betas=betas, bound=bound, lr=lr, decay=decay)
