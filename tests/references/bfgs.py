"""BFGS with a dense inverse H that starts as I, by the textbook loop.

d = H g, theta' = theta - lr d, s = theta' - theta, y = g_b(theta') - g_b(theta) on the batch b of the step; Powell's rule for H first, then
the test of s^T y on the pair that it leaves; the first pair that counts scales I by s^T y / y^T y. Damping adds damping s to y.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
import dense_secant
from references.common import Batch, Drawn, Network, move, theta

NETS = ("mlp", "linear")
VARIANTS = {
    "default": ({}, {}),
    "unscaled": ({"matrix": {"scale_initial": False}}, {"scale": False}),
    "no_powell": ({"matrix": {"powell": 0.0}}, {"powell": 0.0}),
    "skip": ({"matrix": {"skip": 0.5}}, {"skip": 0.5}),
    "damping": ({"damping": 0.3}, {"damping": 0.3}),
    "products": ({"matrix": {"pairs": "products"}}, {"products": True}),
}
ONLY = {name: ("mlp",) for name in ("unscaled", "no_powell", "skip", "damping", "products")}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"scale": False}, {"powell": 0.9}, {"skip": 0.9}, {"damping": 0.1}, {"next_batch": True})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, scale: bool = True, powell: float = 0.2, skip: float = 1e-8, damping: float = 0.0,
    products: bool = False, next_batch: bool = False, lr: float = 0.1,
) -> Tensor:  # fmt: skip
    """next_batch: y with the new gradient of the batch after, which is wrong."""
    model, path = network.make(), []
    rule = dense_secant.Rule(powell=powell, skip=skip, scale_initial=scale)
    at = theta(model)
    H, first = torch.eye(len(at), dtype=at.dtype), True
    for step, batch in enumerate(batches):
        g = dense.gradient(model, network.criterion, *batch)
        s = -lr * H @ g
        at = at + s
        move(model, at)
        other = batches[(step + 1) % len(batches)] if next_batch else batch
        y = dense.hessian(model, network.criterion, *batch) @ s if products else dense.gradient(model, network.criterion, *other) - g
        H, counts = dense_secant.inverse(H, s, y + damping * s, rule, first)
        first = first and not counts
        path.append(at.clone())
    return torch.stack(path)
