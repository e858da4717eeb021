"""Adam (Kingma & Ba 2015) is `torch.optim.Adam`."""

from __future__ import annotations

import torch
from torch import Tensor

from references import stock
from references.common import Batch, Drawn, Network

NETS = ("mlp", "conv")
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {"default": ({}, {})}
STEPS = 20
TOLERANCE = 1e-12


def train(network: Network, batches: list[Batch], drawn: Drawn) -> Tensor:
    return stock.run(network, batches, lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8))
