"""PSGD with a dense Q of all parameters (Li 2018), by whole matrices; see `psgd_family`.

"EQ": Q stays triangular. "inverse_free": the update of the released code since 2025. "first_generation": the steps of 2015 to 2018, divided by the largest
entry of the gradient, from Q = I. "whitening": pairs of gradients and noise, with the clips of the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from references import psgd_family
from references.common import Batch, Drawn, Network, theta

_CLIPS = [{"name": "Momentum", "beta": 0.9}, {"name": "RMSClip", "bound": 2.0}, {"name": "ElementClip", "bound": 10.0}]

NETS = ("mlp", "linear")
VARIANTS = {
    "default": ({}, {}),
    "inverse_free": ({"solver": {"update": "Q0.5EQ1.5"}}, {"update": "Q0.5EQ1.5"}),
    "first_generation": (
        {"solver": {"normaliser": "largest", "step": 0.01, "initial": 1.0}}, {"largest": True, "step": 0.01, "initial": 1.0},
    ),
    "whitening": ({"matrix": "batched_empirical_fisher", "transforms": _CLIPS}, {"whitening": True, "clip": (2.0, 10.0)}),
    "damping": ({"damping": 0.1, "transforms": []}, {"damping": 0.1, "momentum": 0.0}),
}  # fmt: skip
ONLY = {name: ("linear",) for name in ("inverse_free", "first_generation", "whitening", "damping")}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"update": "Q0.5EQ1.5"}, {"step": 0.11}, {"momentum": 0.0}, {"initial": 1.0}, {"damping": 0.01})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-9, update: str = "EQ", step: float = 0.1, largest: bool = False,
    initial: float | None = None, momentum: float = 0.9, whitening: bool = False, clip: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    def parts(model: nn.Module) -> list[tuple[Tensor, psgd_family.Factor]]:
        n = len(theta(model))
        Q = psgd_family.Modes((n,), ("dense",), update=update, whitening=whitening, largest=largest, step=step, initial=initial, decay=0.9)
        return [(torch.arange(n), Q)]

    return psgd_family.train(network, batches, drawn, parts, damping=damping, momentum=momentum, whitening=whitening, clip=clip, lr=0.3)
