"""AdaGrad (Duchi, Hazan & Singer 2011) is `torch.optim.Adagrad`."""

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
    "initial": ({"history": {"initial": 0.1}}, {"initial": 0.1}),
}
STEPS = 20
TOLERANCE = 1e-12
CONTROLS = ({"eps": 1e-6}, {"initial": 1e-4})


def train(network: Network, batches: list[Batch], drawn: Drawn, *, eps: float = 1e-10, initial: float = 0.0) -> Tensor:
    return stock.run(network, batches, lambda params: torch.optim.Adagrad(params, lr=0.01, eps=eps, initial_accumulator_value=initial))
