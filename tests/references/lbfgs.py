"""L-BFGS (Liu & Nocedal 1989) by the two-loop recursion over the last m pairs, with the loop of `bfgs.py`.

The pairs that are kept are those after Powell's rule for H, which is the recursion's own matrix; gamma = s^T y / y^T y of the newest one
kept, 1 before there is one. With damping d = (H^-1 + damping I)^-1 g, from the second step on: in the first there is no matrix yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
from references.common import Batch, Drawn, Network, move, theta

NETS = ("mlp", "linear")
VARIANTS = {
    "default": ({}, {}),
    "memory_3": ({"repr": {"memory": 3}}, {"memory": 3}),
    "from_identity": ({"repr": {"scaling": "none"}}, {"newest": False}),
    "no_powell": ({"matrix": {"powell": 0.0}, "repr": {"memory": 3}}, {"powell": 0.0, "memory": 3}),
    "powell_on_the_matrix": ({"matrix": {"powell_on": "matrix"}}, {"on_matrix": True}),
    "damping": ({"damping": 0.3}, {"damping": 0.3}),
}
ONLY = {name: ("mlp",) for name in ("from_identity", "no_powell", "powell_on_the_matrix", "damping")}
STEPS = 12
TOLERANCE = 1e-10
CONTROLS = ({"memory": 9}, {"newest": False}, {"powell": 0.9}, {"damping": 0.1})

Pairs = list[tuple[Tensor, Tensor]]


def two_loops(pairs: Pairs, v: Tensor, *, newest: bool = True) -> Tensor:
    """H v; pairs: oldest first."""
    q, kept = v.clone(), []
    for s, y in reversed(pairs):
        a = (s @ q) / (s @ y)
        q = q - a * y
        kept.append(a)
    if pairs and newest:
        s, y = pairs[-1]
        q = q * (s @ y) / (y @ y)
    for (s, y), a in zip(pairs, reversed(kept), strict=True):
        q = q + (a - (y @ q) / (s @ y)) * s
    return q


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, memory: int = 10, newest: bool = True, powell: float = 0.2, on_matrix: bool = False,
    damping: float = 0.0, skip: float = 1e-8, lr: float = 0.1,
) -> Tensor:  # fmt: skip
    model, path = network.make(), []
    at = theta(model)
    eye, pairs = torch.eye(len(at), dtype=at.dtype), Pairs()

    def H(v: Tensor) -> Tensor:
        return two_loops(pairs, v, newest=newest)

    def matrix() -> Tensor:
        return torch.linalg.inv(torch.stack([H(e) for e in eye], 1))

    for step, batch in enumerate(batches):
        g = dense.gradient(model, network.criterion, *batch)
        d = torch.linalg.solve(matrix() + damping * eye, g) if damping and step else H(g)
        s, at = -lr * d, at - lr * d
        move(model, at)
        y = dense.gradient(model, network.criterion, *batch) - g
        if on_matrix:
            Bs = matrix() @ s
            if s @ y < powell * s @ Bs:
                theta_ = (1 - powell) * (s @ Bs) / (s @ Bs - s @ y)
                y = theta_ * y + (1 - theta_) * Bs
        elif powell:
            Hy = H(y)
            if s @ y < powell * y @ Hy:
                theta_ = (1 - powell) * (y @ Hy) / (y @ Hy - s @ y)
                s = theta_ * s + (1 - theta_) * Hy
        if s @ y > skip * s.norm() * y.norm():
            pairs[:] = [*pairs, (s, y)][-memory:]
        path.append(at.clone())
    return torch.stack(path)
