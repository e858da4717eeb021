"""KFRA (Botev, Ritter & Barber 2017) for fully connected networks, by its recursion over batch averages.

G_L = (1/N) sum_i (the Hessian of the loss in the output), G_l = (W_{l+1}^T G_{l+1} W_{l+1}) o (1/N) sum_i phi'(h_il) phi'(h_il)^T;
A of the inputs with the homogeneous 1; both averaged from zero with 0.95, divided by 1 - 0.95^t; damped as in K-FAC.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, descend
from references.kfac import _damped

NETS = ("mlp", "square")
VARIANTS = {"default": ({}, {}), "damping": ({"damping": 1e-2}, {"damping": 1e-2}), "interval_3": ({"solver_interval": 3}, {"interval": 3})}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"beta": 0.9},)


def _factors(model: nn.Sequential, criterion: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    inputs, slopes, weights = {}, {}, {}
    last = ""
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            inputs[name], weights[name], last = x, module.weight.detach(), name
            x = x @ module.weight.detach().T + module.bias.detach()
        elif isinstance(module, nn.ReLU):
            slopes[last], x = (x > 0).to(x.dtype), x.clamp(min=0)
        else:
            x = x.tanh()
            slopes[last] = 1 - x**2
    if isinstance(criterion, nn.CrossEntropyLoss):
        p = x.softmax(1)
        G = (p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    else:  # the mean of squares over examples and outputs
        G = 2 / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    found, above = {}, None
    for name in reversed(inputs):
        if above is not None:
            G = (weights[above].T @ G @ weights[above]) * (slopes[name].T @ slopes[name] / len(x))
        a = torch.cat([inputs[name], torch.ones(len(x), 1, dtype=x.dtype)], 1)
        found[name], above = (G, a.T @ a / len(x)), name
    return found


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.1, interval: int = 1, beta: float = 0.95
) -> Tensor:
    factors: dict[str, list[Tensor]] = {}
    inverted: dict[str, Tensor] = {}

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        assert isinstance(model, nn.Sequential)
        result, weight = torch.zeros_like(gradient), 1 - beta ** (step + 1)
        for name, new in _factors(model, network.criterion, batch[0]).items():
            old = factors.get(name, [torch.zeros_like(x) for x in new])
            factors[name] = [beta * x + (1 - beta) * y for x, y in zip(old, new, strict=True)]
            if step % interval == 0:
                inverted[name] = _damped(factors[name][0] / weight, factors[name][1] / weight, damping)
            where = dense.joint_indices(model, name)
            result[where] = torch.linalg.solve(inverted[name], gradient[where])
        return result

    return descend(network, batches, direction, lr=0.1)
