"""Sophia-G (Liu et al. 2024): as Sophia-H in `sophia_h.py`, with h' = N g' o g', g' the gradient of the mean loss at the recorded labels."""

from __future__ import annotations

from torch import Tensor, nn

import dense
from references import sophia_h
from references.common import Batch, Drawn, Network

NETS = sophia_h.NETS
VARIANTS = {name: both for name, both in sophia_h.VARIANTS.items() if name != "signs"}
ONLY = sophia_h.ONLY
STEPS = 12
TOLERANCE = 1e-10
CONTROLS = ({"betas": (0.9, 0.99)}, {"gamma": 10.0}, {"bound": 0.5})


def _sampled(model: nn.Module, network: Network, batch: Batch, drawn: Drawn, number: int) -> Tensor:
    labels = drawn.labels[number]
    return len(labels) * dense.gradient(model, network.criterion, batch[0], labels) ** 2


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, k: int = 10, gamma: float = 0.05, eps: float = 1e-12,
    betas: tuple[float, float] = (0.96, 0.99), bound: float = 1.0, lr: float = 3e-3, decay: float = 0.0,
) -> Tensor:  # fmt: skip
    return sophia_h.run(_sampled, network, batches, drawn, k=k, gamma=gamma, eps=eps, betas=betas, bound=bound, lr=lr, decay=decay)
