"""Adam (Kingma & Ba 2015) is `torch.optim.Adam`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from references import stock
from references.common import Batch, Drawn, Network

NETS = ("mlp", "conv")
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "eps": ({"damping": {"value": 1e-2}}, {"eps": 1e-2}),
    "betas": (
        {"transforms": [{"name": "Momentum", "beta": 0.5, "debias": True}], "history": {"beta": 0.99}}, {"betas": (0.5, 0.99)},
    ),
    "no_momentum": ({"transforms": []}, {"betas": (0.0, 0.999)}),
}  # fmt: skip
STEPS = 20
TOLERANCE = 1e-12
CONTROLS = ({"betas": (0.8, 0.999)}, {"betas": (0.9, 0.99)}, {"eps": 1e-6})


def train(network: Network, batches: list[Batch], drawn: Drawn, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Tensor:
    return stock.run(network, batches, lambda params: torch.optim.Adam(params, lr=1e-3, betas=betas, eps=eps))
