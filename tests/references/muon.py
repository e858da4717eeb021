"""Muon (Jordan et al. 2024): Newton-Schulz on the momentum itself, X <- a X + (b X X^T + c (X X^T)^2) X, tensor by tensor.

M <- 0.95 M + 0.05 G; U = 0.95 M + 0.05 G (Nesterov); a tensor is read as (out, rest), a vector as (n, 1); X starts as U / (|U|_F + 1e-7),
transposed where it has more rows than columns; theta <- (1 - lr wd) theta - lr sqrt(max(1, rows / columns)) X.
With "exact" X is the polar factor U_r V_r^T of the singular values that are not rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dense
from precond import damping, solvers, transforms
from references.common import Batch, Drawn, Network, move, theta

NETS = ("mlp", "conv")
_PLAIN = transforms.Momentum(0.95, debias=False)
_RMS = [transforms.Momentum(0.95, debias=False, nesterov=True), transforms.ShapeScale("rms", 0.2)]
_EXACT: dict[str, Any] = {"solver": solvers.Eigen(power=0.5), "damping": damping.PerFactor(1e-12)}
VARIANTS = {
    "default": ({}, {}),
    "no_nesterov": ({"transforms": [_PLAIN, transforms.ShapeScale()]}, {"nesterov": False}),
    "rms": ({"transforms": _RMS}, {"scale": "rms"}),
    "three_steps": ({"solver": {"steps": 3}}, {"steps": 3}),
    "exact": (_EXACT, {"eps": 1e-12}),
}
ONLY = {"exact": ("square",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"nesterov": False}, {"scale": "rms"}, {"steps": 4}, {"beta": 0.9}, {"of": "gradient"})


def newton_schulz(U: Tensor, of: Tensor, steps: int) -> Tensor:
    """of: what the Gram matrices are made of, `U` itself in Muon."""
    if U.shape[0] > U.shape[1]:
        return newton_schulz(U.T, of.T, steps).T
    a, b, c = 3.4445, -4.7750, 2.0315
    size = of.norm() + 1e-7
    X, Y = U / size, of / size
    for _ in range(steps):
        gram = Y @ Y.T
        q = b * gram + c * gram @ gram
        X, Y = a * X + q @ X, a * Y + q @ Y
    return X


def polar(U: Tensor, eps: float) -> Tensor:
    """(U U^T + eps I)^(-1/2) U over the shorter side."""
    left, values, right = torch.linalg.svd(U, full_matrices=False)
    return left @ torch.diag(values / (values**2 + eps).sqrt()) @ right


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, steps: int = 5, nesterov: bool = True, scale: str = "spectral",
    beta: float = 0.95, eps: float | None = None, of: str = "momentum", lr: float = 0.02, decay: float = 0.0,
) -> Tensor:  # fmt: skip
    model, path = network.make(), []
    at = theta(model)
    M = torch.zeros_like(at)
    for batch in batches:
        gradient = dense.gradient(model, network.criterion, *batch)
        M = beta * M + (1 - beta) * gradient
        moved = beta * M + (1 - beta) * gradient if nesterov else M
        pieces = []
        for name, U in dense.split(moved, model).items():
            flat, raw = (x.reshape(len(x), -1) for x in (U, dense.split(gradient, model)[name]))
            X = newton_schulz(flat, flat if of == "momentum" else raw, steps) if eps is None else polar(flat, eps)
            rows, columns = flat.shape
            s = max(1.0, rows / columns) ** 0.5 if scale == "spectral" else 0.2 * max(rows, columns) ** 0.5
            pieces.append((s * X).flatten())
        at = (1 - lr * decay) * at - lr * torch.cat(pieces)
        move(model, at)
        path.append(at.clone())
    return torch.stack(path)
