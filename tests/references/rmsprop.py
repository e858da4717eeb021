"""RMSprop (Tieleman & Hinton 2012) is `torch.optim.RMSprop`."""

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
    "alpha": ({"history": {"beta": 0.9}}, {"alpha": 0.9}),
}
STEPS = 20
TOLERANCE = 1e-12
CONTROLS = ({"alpha": 0.9}, {"eps": 1e-6})


def train(network: Network, batches: list[Batch], drawn: Drawn, *, alpha: float = 0.99, eps: float = 1e-8) -> Tensor:
    return stock.run(network, batches, lambda params: torch.optim.RMSprop(params, lr=0.01, alpha=alpha, eps=eps))
