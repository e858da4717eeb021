"""The Neumann optimizer's inner series (Krishnan, Xiao & Saurous 2018), by the paper's own inner loop on the quadratic model of the batch:

    m <- mu m - eta (g + mu H m) from m = 0, terms + 1 times ;   d = -mu m .

That is a sum_{j <= terms} (I - a (H + damping I))^j g with a = mu eta and damping = (1 - mu) / (mu eta), and so are a and the damping given back:
mu = 1 - a damping, eta = a / mu. By default a = 1 / (1.1 l), l the largest |Ritz value| of H + damping I plus its residual, in ten dimensions
from a fixed start. Where H has negative eigenvalues beyond the damping the series diverges: the recipe halves a, which the paper has not, until no
residual g - (H + damping I) d of the terms is above 1.01 |g|.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
import dense_krylov
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "linear")
VARIANTS = {
    "default": ({}, {}),
    "no_friction": ({"solver": {"terms": 7, "step_size": 0.05}, "damping": 0.0}, {"terms": 7, "mu": 1.0, "eta": 0.05}),
    "friction": ({"solver": {"terms": 12, "step_size": 0.18}, "damping": 0.1 / 0.18}, {"terms": 12, "mu": 0.9, "eta": 0.2}),
    "ggn": ({"matrix": "ggn", "damping": 0.01}, {"ggn": True, "damping": 0.01}),
}
# of a linear layer H has few distinct eigenvalues: once its Krylov space is exhausted the estimate of l is one of rounding
ONLY = {"default": ("mlp",), "no_friction": ("linear",), "friction": ("mlp",), "ggn": ("mlp",)}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"terms": 9}, {"damping": 0.04}, {"margin": 1.11}, {"ggn": True}, {"guarded": False})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.03, terms: int = 10, margin: float = 1.1, mu: float | None = None,
    eta: float | None = None, ggn: bool = False, guarded: bool = True,
) -> Tensor:  # fmt: skip
    """mu, eta: the paper's; None: those of the damping and of the step size that is found."""

    def direction(model: torch.nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        H = (dense.ggn if ggn else dense.hessian)(model, network.criterion, *batch)
        C = H + damping * torch.eye(len(H), dtype=H.dtype)
        if mu is not None and eta is not None:
            return series(H, C, gradient, mu, eta)[0]
        start = torch.randn(len(H), generator=torch.Generator().manual_seed(0)).to(H.dtype)
        a = 1 / (margin * dense_krylov.largest_magnitude(C, start, 10))
        while True:
            d, diverged = series(H, C, gradient, 1 - a * damping, a / (1 - a * damping))
            if not (guarded and diverged):
                return d
            a = a / 2

    def series(H: Tensor, C: Tensor, g: Tensor, friction: float, rate: float) -> tuple[Tensor, bool]:
        """-mu m, and whether a residual of it was above the first."""
        m, diverged = -rate * g, False
        for _ in range(terms):
            diverged = diverged or bool((g + C @ (friction * m)).norm() > 1.01 * g.norm())
            m = friction * m - rate * (g + H @ (friction * m))
        return -friction * m, diverged

    return descend(network, batches, direction, lr=1.0)
