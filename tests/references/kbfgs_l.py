"""K-BFGS(L): as K-BFGS in `kbfgs.py`, with H_g by the two-loop recursion from I over the last m pairs, which are kept as damped."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from references import kbfgs
from references.common import Batch, Drawn, Network
from references.lbfgs import Pairs, two_loops

NETS = kbfgs.NETS
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": kbfgs.VARIANTS["default"],
    "lambda": kbfgs.VARIANTS["lambda"],
    "add": kbfgs.VARIANTS["add"],
    "memory_3": ({"repr": {"memory": 3}}, {"memory": 3}),
}
ONLY = kbfgs.ONLY | {"memory_3": ("mlp",)}
STEPS = kbfgs.STEPS
TOLERANCE = 1e-10
CONTROLS = ({"memory": 6}, {"memory": 0}, {"second": "add"})


class Outputs:
    """H_g by its pairs."""

    def __init__(self, n: int, memory: int) -> None:
        self.pairs, self.memory = Pairs(), memory

    def apply(self, X: Tensor) -> Tensor:
        columns = [two_loops(self.pairs, x, newest=False) for x in X.reshape(len(X), -1).T]
        return torch.stack(columns, 1).view_as(X)

    def add(self, s: Tensor, y: Tensor) -> None:
        self.pairs = [*self.pairs, (s, y)][-self.memory :] if self.memory else []


def train(network: Network, batches: list[Batch], drawn: Drawn, *, memory: int = 100, **options: Any) -> Tensor:
    return kbfgs.train(network, batches, drawn, outputs=partial(Outputs, memory=memory), **options)
