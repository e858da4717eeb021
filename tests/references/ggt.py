"""GGT (Agarwal et al. 2019), by a singular value decomposition of the window: G = sum_i s_i u_i v_i^T, one row a gradient, newest last.

As released: d = sum over s_i^2 > 1e-4 of v_i v_i^T m / s_i with m <- 0.9 m + g. The paper's form: d = m / eps + sum_i
(1/(s_i + eps) - 1/eps) v_i v_i^T m. A gradient j steps old has the weight beta2^(j/2) in G.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
_PAPER = {"solver": {"complement": "damped", "threshold": 0.0}, "damping": {"name": "Outside", "value": 0.05}}
VARIANTS = {
    "default": ({}, {}),
    "window_3": ({"history": {"m": 3}}, {"m": 3}),
    "forgets": ({"history": {"m": 4, "decay": 0.5}}, {"m": 4, "beta2": 0.5}),
    "paper": (_PAPER, {"eps": 0.05}),
    "no_momentum": ({"transforms": []}, {"beta1": 0.0}),
    "threshold": ({"solver": {"threshold": 0.05}}, {"threshold": 0.05}),
    "gram": ({"repr": "full_gram"}, {}),
}
ONLY = {"no_momentum": ("mlp",), "threshold": ("mlp",), "gram": ("mlp",)}
STEPS = 7
TOLERANCE = 1e-10
CONTROLS = ({"m": 3}, {"beta2": 0.5}, {"threshold": 0.05}, {"beta1": 0.0}, {"eps": 0.05})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, m: int = 100, beta1: float = 0.9, beta2: float = 1.0, threshold: float = 1e-4,
    eps: float | None = None,
) -> Tensor:  # fmt: skip
    window: list[Tensor] = []
    momentum: list[Tensor] = []

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        window[:] = [*window, gradient][-m:]
        momentum[:] = [gradient + (beta1 * momentum[0] if momentum else 0.0)]
        ages = reversed(range(len(window)))
        G = torch.stack([beta2 ** (age / 2) * g for age, g in zip(ages, window, strict=True)])
        _, s, V = torch.linalg.svd(G, full_matrices=False)
        inner = V @ momentum[0]
        if eps is not None:
            return momentum[0] / eps + V.T @ (inner / (s + eps) - inner / eps)
        kept = s.square() > threshold
        return V[kept].T @ (inner[kept] / s[kept])

    return descend(network, batches, direction, lr=0.1)
