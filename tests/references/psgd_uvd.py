"""PSGD with Q = (I + U V^T) diag(d) on all parameters (Li 2022), held dense; see `psgd_family`. The first U, V and which of them moves are recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from references import psgd_family
from references.common import Batch, Drawn, Network, theta

_CLIPS = [{"name": "Momentum", "beta": 0.9}, {"name": "RMSClip", "bound": 2.0}, {"name": "ElementClip", "bound": 10.0}]

NETS = ("mlp",)
VARIANTS = {
    "default": ({}, {}),
    "rank_2": ({"repr": {"rank": 2}}, {"rank": 2}),
    "whitening": ({"matrix": "batched_empirical_fisher", "transforms": _CLIPS}, {"whitening": True, "clip": (2.0, 10.0)}),
    "damping": ({"damping": 0.1, "solver": {"step": 0.5}}, {"damping": 0.1, "step": 0.5}),
}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"step": 0.11}, {"momentum": 0.0}, {"damping": 0.01}, {"swapped": True})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-9, step: float = 0.1, rank: int = 10, momentum: float = 0.9,
    whitening: bool = False, clip: tuple[float, float] | None = None, swapped: bool = False,
) -> Tensor:  # fmt: skip
    """swapped: the other one of U and V moves."""

    def parts(model: nn.Module) -> list[tuple[Tensor, psgd_family.Factor]]:
        ((U, V),) = drawn.factors
        assert U.shape == V.shape == (len(theta(model)), rank)
        for X in (U, V):
            torch.testing.assert_close(X.norm() ** 2, torch.tensor(0.1, dtype=X.dtype))
        assert {True, False} == set(drawn.moves)
        return [(torch.arange(len(U)), psgd_family.LowRank(U, V, [moves != swapped for moves in drawn.moves], step=step))]

    return psgd_family.train(network, batches, drawn, parts, damping=damping, momentum=momentum, whitening=whitening, clip=clip, lr=0.3)
