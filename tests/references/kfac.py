"""K-FAC (Martens & Grosse 2015), KL clip (Ba, Grosse & Martens 2017): every block a dense kron(B_d, A_d) and a dense solve.

A <- 0.95 A + 0.05 A_t and B alike, from zero, divided by 1 - 0.95^t; A_t, B_t from the recorded labels; every T-th step
A_d = A + pi sqrt(damping) I, B_d = B + sqrt(damping) / pi I with pi^2 = (tr A / dim A) / (tr B / dim B); all directions times
min(1, sqrt(c / (lr^2 sum <D, G>))); then SGD with momentum 0.9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
import dense_kron
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "interval_2": ({"solver_interval": 2}, {"interval": 2}),
    "damping": ({"damping": 1e-3}, {"damping": 1e-3}),
    "no_clip": ({"transforms": [], "damping": 1.0}, {"bound": None, "damping": 1.0}),
    "curvature_every_3": ({"curvature_interval": 3, "solver_interval": 3}, {"interval": 3, "observe": 3}),
}
STEPS = 12
TOLERANCE = 1e-10
CONTROLS = ({"interval": 2}, {"bound": 2e-3}, {"damping": 0.2})


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _damped(B: Tensor, A: Tensor, damping: float) -> Tensor:
    pi = ((A.trace() / A.shape[0]) / (B.trace() / B.shape[0])).sqrt()
    level = damping**0.5
    eye = torch.eye
    return torch.kron(B + level / pi * eye(B.shape[0], dtype=B.dtype), A + pi * level * eye(A.shape[0], dtype=A.dtype))


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, interval: int = 10, observe: int = 1, damping: float = 0.1,
    bound: float | None = 1e-3, lr: float = 0.1,
) -> Tensor:  # fmt: skip
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    inverted: dict[str, Tensor] = {}
    seen = iter(drawn.labels)
    weight = 0.0

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        nonlocal weight
        inputs, targets = batch
        if step % observe == 0:
            weight = 0.95 * weight + 0.05
            output = dense.predict(model, inputs)
            cotangents = (output.softmax(1) - F.one_hot(next(seen), output.shape[1])).unsqueeze(0)
            for name in _layers(model):
                B, A = dense_kron.kron_expand(model, network.criterion, inputs, targets, cotangents, name)
                old = factors.get(name, (torch.zeros_like(B), torch.zeros_like(A)))
                factors[name] = (0.95 * old[0] + 0.05 * B, 0.95 * old[1] + 0.05 * A)
        if step % interval == 0:
            inverted.update({name: _damped(B / weight, A / weight, damping) for name, (B, A) in factors.items()})
        result = torch.zeros_like(gradient)
        for name, matrix in inverted.items():
            where = dense.joint_indices(model, name)
            result[where] = torch.linalg.solve(matrix, gradient[where])
        if bound is None:
            return result
        return result * min(1.0, (bound / (lr**2 * float(result @ gradient))) ** 0.5)

    return descend(network, batches, direction, lr=lr, momentum=0.9)
