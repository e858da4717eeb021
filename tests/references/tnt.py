"""TNT (Ren & Goldfarb 2021): for every tensor a dense product of the inverses of its damped, balanced mode covariances.

F_m is an average (the first is copied, then 0.9 F_m + 0.1 the new) of N contract_m(g~), g~ the mean gradient at drawn labels; a convolution's weight
is (out, rest). With t = tr F_1, P the number of entries and c = (t / P)^(1/k): U_m = F_m / (c^(k-1) P / n_m), all of mean trace c;
D = M x_1 (U_1 + eps I)^-1 ... x_k (U_k + eps I)^-1, inverses of every T-th step, M <- 0.9 M + G; SGD without momentum.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
from precond import damping
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
_EACH: dict[str, Any] = {"matrix": "fisher_mc"}
VARIANTS = {
    "default": ({}, {}),
    "interval_2": ({"solver_interval": 2, "damping": {"value": 0.3}}, {"interval": 2, "eps": 0.3}),
    "examples": (_EACH, {"per": "example"}),
    "labels": ({"matrix": "empirical_fisher"}, {"per": "label"}),
    "kernel": ({"repr": {"merge_dims": "kernel"}}, {"kept": 2}),
    "warm_start": (
        {"start_step": 3, "before_start": "nothing", "solver_interval": 3, "history": {"name": "Ema", "beta": 0.9, "schedule": "martens"}},
        {"start": 3, "interval": 3},
    ),
    "unbalanced": ({"damping": damping.PerFactor(0.03)}, {"balanced": False}),
}
ONLY = {"kernel": ("conv",), "labels": ("mlp",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"interval": 2}, {"eps": 0.04}, {"per": "label"}, {"balanced": False}, {"copy": False}, {"terms": False})


def _contractions(G: Tensor) -> list[Tensor]:
    return [G.movedim(m, 0).reshape(n, -1) @ G.movedim(m, 0).reshape(n, -1).T for m, n in enumerate(G.shape)]


def _inverse(factors: list[Tensor], eps: float, balanced: bool) -> Tensor:
    k, t, P = len(factors), factors[0].trace(), torch.Size([len(f) for f in factors]).numel()
    c = (t / P) ** (1 / k)
    U = [f / (c ** (k - 1) * P / len(f)) for f in factors] if balanced else factors
    whole = functools.reduce(torch.kron, [torch.linalg.inv(u + eps * torch.eye(len(u), dtype=u.dtype)) for u in U])
    return whole if balanced else t ** (k - 1) * whole


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, eps: float = 0.03, interval: int = 5, per: str = "batch", kept: int = 1,
    start: int = 0, balanced: bool = True, copy: bool = True, terms: bool = True, lr: float = 2e-3,
) -> Tensor:  # fmt: skip
    """per: "batch" or "example" with drawn labels, "label": examples with their own. copy: False starts the average from zero, which is wrong."""
    factors: dict[str, list[Tensor]] = {}
    inverses: dict[str, Tensor] = {}
    momenta: dict[str, Tensor] = {}
    seen = iter(drawn.labels)

    def view(G: Tensor) -> Tensor:
        return G.reshape(*G.shape[:kept], -1) if G.dim() > kept else G

    def observed(model: nn.Module, batch: Batch) -> Tensor:
        """(rows, P): C = sum of their outer products."""
        inputs, targets = batch
        labels = targets if per == "label" else next(seen)
        n = len(inputs)
        if per == "batch":
            return dense.gradient(model, F.cross_entropy, inputs, labels).unsqueeze(0) * (n**0.5 if terms else 1.0)
        return dense.per_example_gradients(model, network.criterion, inputs, labels) / n**0.5

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        keep = 0.9 if step or not copy else 0.0
        if start:  # a plain mean over the first ten
            keep = min(step / (step + 1), 0.9)
        rows = [dense.split(row, model) for row in observed(model, batch)]
        pieces = []
        for name, G in dense.split(gradient, model).items():
            new = [sum(parts[1:], parts[0]) for parts in zip(*(_contractions(view(row[name])) for row in rows), strict=True)]
            old = factors.get(name, [torch.zeros_like(f) for f in new])
            factors[name] = [keep * a + (1 - keep) * b for a, b in zip(old, new, strict=True)]
            if step % interval == 0:
                inverses[name] = _inverse(factors[name], eps, balanced)
            if step >= start:
                momenta[name] = 0.9 * momenta.get(name, torch.zeros_like(G)) + G
            pieces.append(inverses[name] @ momenta[name].flatten() if step >= start else torch.zeros_like(G).flatten())
        return torch.cat(pieces)

    return descend(network, batches, direction, lr=lr)
