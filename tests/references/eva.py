"""Eva (Zhang, Shi & Li 2023) by its closed form: D = (1/l) [G - (b^T G a) / (l + |a|^2 |b|^2) b a^T] for [W, b] of a layer.

a: the mean over examples of the input, with the homogeneous 1, itself a mean over positions; b: the mean over examples of the gradient of
the example's loss at the output, summed over positions. The first pair is copied, later ones enter with 1 - 0.95. KL clip over all
layers, SGD with momentum 0.9. Without a layer's B ("eva_f", the authors' name): D = (1/l) [G - G a a^T / (l + |a|^2)].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
import dense_kron
from references.common import Batch, Drawn, Network, descend
from references.kfac import _layers

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "released_weights": ({"history": {"beta": 0.05}}, {"beta": 0.05}),
    "debiased": ({"history": 0.95}, {"debias": True}),
    "no_clip": ({"transforms": [], "damping": 1.0}, {"bound": None, "damping": 1.0}),
    "sampled": ({"matrix": "fisher_mc"}, {"sampled": True}),
    "interval_3": ({"curvature_interval": 3}, {"interval": 3}),
    "eva_f": ({"matrix": "input_second_moment", "repr": {"output": "identity"}, "damping": {"name": "Tikhonov", "value": 0.03},
               "solver": "eigen"}, {"outputs": False}),
}  # fmt: skip
ONLY = {name: ("mlp",) for name in ("released_weights", "debiased", "no_clip", "sampled", "interval_3")}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"beta": 0.9}, {"debias": True}, {"bound": 2e-3}, {"damping": 0.06}, {"interval": 2}, {"outputs": False})


def _direction(G: Tensor, a: Tensor, b: Tensor | None, damping: float) -> Tensor:
    if b is None:
        return (G - torch.outer(G @ a, a) / (damping + a @ a)) / damping
    return (G - (b @ G @ a) / (damping + (a @ a) * (b @ b)) * torch.outer(b, a)) / damping


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, beta: float = 0.95, debias: bool = False, damping: float = 0.03,
    bound: float | None = 1e-3, interval: int = 1, sampled: bool = False, outputs: bool = True, lr: float = 0.03,
) -> Tensor:  # fmt: skip
    means: dict[str, tuple[Tensor, Tensor]] = {}
    seen = iter(drawn.labels)

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        if step % interval == 0:
            output = dense.predict(model, batch[0])
            labels = next(seen) if sampled else batch[1]
            sent = (output.softmax(1) - F.one_hot(labels, output.shape[1])).unsqueeze(0)
            for name in _layers(model):
                ((a, g),) = dense_kron.capture(model, batch[0], sent, name)
                new = a.mean((0, 1)), g[0].sum(1).mean(0)
                if name in means or debias:
                    old = means.get(name, tuple(map(torch.zeros_like, new)))
                    new = tuple(beta * x + (1 - beta) * y for x, y in zip(old, new, strict=True))
                means[name] = new
        weight = 1 - beta ** (step // interval + 1) if debias else 1.0
        result = torch.zeros_like(gradient)
        for name, (a, b) in means.items():
            where = dense.joint_indices(model, name)
            G = gradient[where].reshape(len(b), len(a))
            result[where] = _direction(G, a / weight, b / weight if outputs else None, damping).flatten()
        return result if bound is None else result * min(1.0, (bound / (lr**2 * float(result @ gradient))) ** 0.5)

    return descend(network, batches, direction, lr=lr, momentum=0.9)
