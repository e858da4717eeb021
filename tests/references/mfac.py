"""M-FAC (Frantar, Kurtic & Alistarh 2021): the inverse of damping I + (1/m) sum of g g^T over the last m gradients, by its recursion.

H_0 = I / damping, H_j = H_{j-1} - H_{j-1} g_j (H_{j-1} g_j)^T / (m + g_j^T H_{j-1} g_j) over the window, the newest gradient included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "window_3": ({"history": {"m": 3}}, {"m": 3}),
    "released": ({"damping": 1e-5, "history": {"m": 1024}}, {"damping": 1e-5, "m": 1024}),
    "mean": ({"history": {"m": 4, "reduction": "mean"}}, {"m": 4, "mean": True}),
    "gram": ({"repr": "full_gram"}, {}),
    "by_layer": ({"repr": "layer_low_rank", "history": {"m": 3}}, {"m": 3, "layers": True}),
    "curvature_every_2": ({"curvature_interval": 2, "history": {"m": 2}}, {"observe": 2, "m": 2}),
}
ONLY = {name: ("mlp",) for name in ("released", "mean", "gram", "by_layer", "curvature_every_2")}
STEPS = 7
TOLERANCE = 1e-10
CONTROLS = ({"m": 3}, {"mean": True}, {"damping": 2e-2}, {"layers": True})


def _inverse(window: list[Tensor], damping: float, m: int) -> Tensor:
    H = torch.eye(len(window[0]), dtype=window[0].dtype) / damping
    for g in window:
        H = H - torch.outer(H @ g, H @ g) / (m + g @ H @ g)
    return H


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, m: int = 128, damping: float = 1e-2, mean: bool = False, layers: bool = False,
    observe: int = 1,
) -> Tensor:  # fmt: skip
    window: list[Tensor] = []

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        if step % observe == 0:
            window[:] = [*window, gradient][-m:]
        places = dense.positions(model)
        whole = [torch.arange(len(gradient))]
        blocks = [torch.cat([torch.arange(p.stop)[p] for p in map(places.get, names)]) for _, names in dense.layer_groups(model)]
        result = torch.zeros_like(gradient)
        for where in blocks if layers else whole:
            result[where] = _inverse([g[where] for g in window], damping, len(window) if mean else m) @ gradient[where]
        return result

    return descend(network, batches, direction, lr=0.01)
