"""CurveBall (Henriques et al. 2019) as the paper and the released code have it, with z = -d and Ghat = GGN + lambda I:

    D = Ghat z + g ;   [[D^T Ghat D, D^T Ghat z], [D^T Ghat z, z^T Ghat z]] [beta, -rho] = [g^T D, g^T z] ;   z <- rho z - beta D ;   theta <- theta + z

From z = 0 the system is singular: beta = g^T D / D^T Ghat D. After steps 1, 6, 11, ... lambda is divided by 0.999^5 where the loss of the batch fell by
less than half of what the model says (g^T z + z^T Ghat z / 2), and multiplied where it fell by more than one and a half of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
from references.common import Batch, Drawn, Network, move, theta

NETS = ("mlp", "conv", "linear")
VARIANTS = {
    "default": ({}, {}),
    "fixed": ({"solver": {"rho": 0.9, "beta": 0.1}}, {"rho": 0.9, "beta": 0.1}),
    "published": ({"damping": {"value": 1.0}}, {"damping": 1.0}),
    "eager": (
        {"damping": {"value": 10.0, "factor": 0.5, "every": 1, "offset": 0}}, {"damping": 10.0, "factor": 0.5, "every": 1, "first": 0},
    ),
    "low": (
        {"damping": {"value": 1e-3, "factor": 0.5, "every": 2, "offset": 0}}, {"damping": 1e-3, "factor": 0.5, "every": 2, "first": 0},
    ),
    "eager_fixed": (
        {"damping": {"value": 10.0, "factor": 0.5, "every": 2, "offset": 1}, "solver": {"rho": 0.9, "beta": 0.05}},
        {"damping": 10.0, "factor": 0.5, "every": 2, "rho": 0.9, "beta": 0.05},
    ),
}  # fmt: skip
ONLY = {"fixed": ("mlp",), "published": ("mlp",), "eager": ("mlp", "linear"), "low": ("mlp",), "eager_fixed": ("mlp",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"damping": 0.101}, {"rho": 0.9, "beta": 0.1}, {"upper": 0.9})


def _coefficients(G: Tensor, D: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if not z.any():
        return (g @ D) / (D @ G @ D), torch.zeros_like(g[0])
    system = torch.stack([torch.stack([D @ G @ D, D @ G @ z]), torch.stack([D @ G @ z, z @ G @ z])])
    beta, minus_rho = torch.linalg.solve(system, torch.stack([g @ D, g @ z]))
    return beta, -minus_rho


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.1, factor: float = 0.999**5, every: int = 5, first: int = 1,
    rho: float | None = None, beta: float | None = None, lower: float = 0.5, upper: float = 1.5,
) -> Tensor:  # fmt: skip
    model, path = network.make(), []
    at = theta(model)
    z, lam = torch.zeros_like(at), damping
    for step, (inputs, targets) in enumerate(batches, start=1):
        g = dense.gradient(model, network.criterion, inputs, targets)
        G = dense.ggn(model, network.criterion, inputs, targets) + lam * torch.eye(len(g), dtype=g.dtype)
        before = network.criterion(model(inputs), targets).item()
        D = G @ z + g
        b, r = (beta, rho) if beta is not None and rho is not None else _coefficients(G, D, z, g)
        z = r * z - b * D
        at = at + z
        move(model, at)
        path.append(at.clone())
        if step % every == first % every:
            ratio = (network.criterion(model(inputs), targets).item() - before) / float(g @ z + z @ G @ z / 2)
            lam = lam / factor if ratio < lower else lam * factor if ratio > upper else lam
    return torch.stack(path)
