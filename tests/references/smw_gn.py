"""SMW-GN (Ren & Goldfarb 2019): (G + l I) d = g by a dense solve, G the Gauss-Newton matrix of the batch; otherwise as `smw_ng`."""

from __future__ import annotations

from torch import Tensor

from references import smw_ng
from references.common import Batch, Drawn, Network

NETS = ("mlp", "conv", "linear")
VARIANTS = {
    "default": ({}, {}),
    "bold": ({"damping": {"value": 1e-3}}, {"damping": 1e-3}),  # rho is below, between and above the thresholds
    "fixed": ({"damping": 0.3}, {"damping": 0.3, "factor": 1.0}),
    "plain_ratio": ({"damping": {"include_damping": False}}, {"include": False}),
}
ONLY = {"fixed": ("mlp",), "plain_ratio": ("linear",), "bold": ("mlp",)}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"factor": 1.0}, {"damping": 0.011}, {"matrix": "empirical_fisher"})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, matrix: str = "ggn", damping: float = 0.01, factor: float = 1 / 1.01,
    include: bool = True,
) -> Tensor:  # fmt: skip
    return smw_ng.train(network, batches, drawn, matrix=matrix, damping=damping, factor=factor, include=include)
