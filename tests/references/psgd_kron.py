"""PSGD with one factor a dimension of each tensor (Li 2019), each Q held as the dense Kronecker product; see `psgd_family`.

A dimension n of a tensor has a dense factor where n^2 is at most `skew` times the number of entries, else a diagonal one. "joint": one pair
of dense factors for the matrix [W, b] of each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references import psgd_family
from references.common import Batch, Drawn, Network

_CLIPS = [{"name": "Momentum", "beta": 0.9}, {"name": "RMSClip", "bound": 2.0}, {"name": "ElementClip", "bound": 10.0}]

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "triangular": ({"solver": {"update": "EQ"}}, {"update": "EQ"}),
    "skew_1": ({"repr": {"max_skew": 1.0}}, {"skew": 1.0}),
    "all_dense": ({"repr": {"max_skew": None, "oversized": "tile"}}, {"skew": float("inf")}),
    "joint": ({"repr": "kron_io"}, {"joint": True}),
    "whitening": ({"matrix": "batched_empirical_fisher", "transforms": _CLIPS}, {"whitening": True, "clip": (2.0, 10.0)}),
    "kron_torch": (
        {
            "matrix": {"name": "batched_empirical_fisher", "of": "momentum"},
            "solver": {"update": "EQ", "bound": "column", "decay": 0.0, "initial": 1.0},
            "transforms": [{"name": "Momentum", "beta": 0.9}, {"name": "RMSClip", "bound": 1.1}],
        },
        {"whitening": True, "of_momentum": True, "update": "EQ", "column": True, "decay": 0.0, "initial": 1.0, "clip": (1.1, float("inf"))},
    ),
}  # fmt: skip
ONLY = {name: ("mlp",) for name in VARIANTS if name != "default"}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"update": "EQ"}, {"skew": 1.0}, {"step": 0.11}, {"momentum": 0.0}, {"initial": 1.0}, {"damping": 0.01})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 1e-9, update: str = "Q0.5EQ1.5", step: float = 0.1, skew: float = 4.0,
    joint: bool = False, initial: float | None = None, decay: float = 0.9, momentum: float = 0.9, whitening: bool = False,
    clip: tuple[float, float] | None = None, of_momentum: bool = False, column: bool = False,
) -> Tensor:  # fmt: skip
    def factor(sizes: tuple[int, ...], forms: tuple[str, ...]) -> psgd_family.Factor:
        return psgd_family.Modes(sizes, forms, update=update, whitening=whitening, column=column, step=step, initial=initial, decay=decay)

    def parts(model: nn.Module) -> list[tuple[Tensor, psgd_family.Factor]]:
        if joint:
            layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            indices = [(dense.joint_indices(model, name), model.get_submodule(name).weight.shape[0]) for name in layers]
            return [(at, factor((out, len(at) // out), ("dense", "dense"))) for at, out in indices]
        made: list[tuple[Tensor, psgd_family.Factor]] = []
        start = 0
        for p in dense.parameters(model):
            forms = tuple("dense" if n * n <= skew * p.numel() else "diagonal" for n in p.shape)
            made.append((torch.arange(start, start + p.numel()), factor(tuple(p.shape), forms)))
            start += p.numel()
        return made

    return psgd_family.train(
        network, batches, drawn, parts, damping=damping, momentum=momentum, whitening=whitening, clip=clip, lr=0.3, of_momentum=of_momentum
    )
