"""K-BFGS (Goldfarb, Ren & Bahamou 2020), layer by layer, as released but for one spot.

Step t: M <- 0.9 M + 0.1 G; A <- 0.9 A + 0.1 mean a a^T, copied from the first batch; A_LM = A + sqrt(l) I, H_a = A_LM^-1 at first, H_g = I.
theta <- theta - lr H_g M H_a with the inverses of before this step. Then the same batch runs at the new parameters:
s = mean h' - mean h, y = mean dl/dh' - mean dl/dh, both averaged by 0.9 from 0 without correction. Powell's rule for H_g with mu_1 = 0.2, then
mu_2 = sqrt(l): "mix" moves y towards s where s^T y < mu_2 s^T s, "add" adds mu_2 s; a BFGS update of H_g by (s, y), unless
s^T y <= 1e-4 s^T s |mean dl/dh|; one of H_a by (H_a abar, A_LM H_a abar), abar = mean a, unless s^T y <= 1e-4 s^T s |abar|.

In the released code the last entry of abar, that of the homogeneous 1, is the mean of the others; here it is 1. Rows are those of examples
and positions; mean dl/dh is the gradient of the mean loss summed over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dense
import dense_kron
from references.common import Batch, Drawn, Network, move, theta

NETS = ("mlp", "conv")
_OTHER: dict[str, Any] = {"name": "PerFactor", "value": 0.1, "only": (1,)}
VARIANTS = {
    "default": ({}, {}),
    "lambda": ({"damping": _OTHER, "matrix": {"amount": 0.1}}, {"root": 0.1}),
    "add": ({"matrix": {"second": "add"}}, {"second": "add"}),
    "no_momentum": ({"transforms": []}, {"momentum": 0.0}),
    "full_batch": ({"matrix": {"decay": 0.0}, "damping": _OTHER}, {"decay": 0.0, "root_A": 0.1}),
}
ONLY = {name: ("mlp",) for name in ("lambda", "add", "no_momentum", "full_batch")}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"root_A": 0.25}, {"root": 0.8}, {"second": "add"}, {"decay": 0.8}, {"momentum": 0.8}, {"first": False}, {"late": False})

Inverse = Callable[[Tensor], Tensor]


class Outputs:
    """H_g: dense, from I."""

    def __init__(self, n: int) -> None:
        self.H = torch.eye(n, dtype=torch.float64)

    def apply(self, X: Tensor) -> Tensor:
        return self.H @ X

    def add(self, s: Tensor, y: Tensor) -> None:
        self.H = follow(self.H, s, y)


def follow(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    rho, eye = 1 / (s @ y), torch.eye(len(s), dtype=s.dtype)
    return (eye - rho * torch.outer(s, y)) @ H @ (eye - rho * torch.outer(y, s)) + rho * torch.outer(s, s)


def damped(s: Tensor, y: Tensor, H: Inverse, second: str, mu: float) -> tuple[Tensor, Tensor]:
    Hy = H(y)
    if s @ y < 0.2 * y @ Hy:
        t = 0.8 * (y @ Hy) / (y @ Hy - s @ y)
        s = t * s + (1 - t) * Hy
    if second == "add":
        return s, y + mu * s
    if s @ y < mu * s @ s:
        t = (1 - mu) * (s @ s) / (s @ s - s @ y)
        y = t * y + (1 - t) * s
    return s, y


def counts(s: Tensor, y: Tensor, r: Tensor) -> bool:
    return bool(s @ y > 1e-4 * (s @ s) * r.norm())


def seen(model: nn.Module, network: Network, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(rows a, mean output, sum of the output gradients of the mean loss) of every layer."""
    output = dense.predict(model, batch[0]).requires_grad_()
    with torch.enable_grad():
        cotangent = torch.autograd.grad(network.criterion(output, batch[1]), output)[0]
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            ((a, g),) = dense_kron.capture(model, batch[0], cotangent.unsqueeze(0), name)
            a, W = a.flatten(0, 1), layer.weight.detach().flatten(1)
            W = W if layer.bias is None else torch.cat([W, layer.bias.detach().unsqueeze(1)], 1)
            found[name] = (a, W @ a.mean(0), g.flatten(0, 2).sum(0))
    return found


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, root: float = 0.3, root_A: float | None = None, second: str = "mix", decay: float = 0.9,
    momentum: float = 0.9, first: bool = True, late: bool = True, lr: float = 0.3, outputs: Callable[[int], Any] = Outputs,
) -> Tensor:  # fmt: skip
    """first: False starts A from zero, bias-corrected; late: False moves H_a before the step. Both are wrong."""
    model, path = network.make(), []
    at, M = theta(model), torch.zeros_like(theta(model))
    A: dict[str, Tensor] = {}
    H_a: dict[str, Tensor] = {}
    H_g: dict[str, Any] = {}
    average: dict[str, tuple[Tensor, Tensor]] = {}

    def shift_inputs(name: str, a: Tensor, A_LM: Tensor) -> None:
        s = H_a[name] @ a.mean(0)
        if counts(s, A_LM @ s, a.mean(0)):
            H_a[name] = follow(H_a[name], s, A_LM @ s)

    for step, batch in enumerate(batches):
        before = seen(model, network, batch)
        M = momentum * M + (1 - momentum) * dense.gradient(model, network.criterion, *batch)
        direction, A_LM = torch.zeros_like(M), {}
        for name, (a, h, _) in before.items():
            new = a.T @ a / len(a)
            A[name] = new if first and not step else 0.9 * A.get(name, torch.zeros_like(new)) + 0.1 * new
            mean = A[name] if first else A[name] / (1 - 0.9 ** (step + 1))
            A_LM[name] = mean + (root if root_A is None else root_A) * torch.eye(len(new), dtype=new.dtype)
            if not step:
                H_a[name], H_g[name] = torch.linalg.inv(A_LM[name]), outputs(len(h))
                average[name] = (torch.zeros_like(h), torch.zeros_like(h))
            elif not late:
                shift_inputs(name, a, A_LM[name])
            where = dense.joint_indices(model, name)
            direction[where] = (H_g[name].apply(M[where].view(len(h), -1)) @ H_a[name]).flatten()
        at = at - lr * direction
        move(model, at)
        after = seen(model, network, batch)
        for name, (a, h, g) in before.items():
            if late:
                shift_inputs(name, a, A_LM[name])
            changes = (after[name][1] - h, after[name][2] - g)
            old_s, old_y = average[name]
            average[name] = (decay * old_s + (1 - decay) * changes[0], decay * old_y + (1 - decay) * changes[1])
            s, y = damped(*average[name], H_g[name].apply, second, root)
            if counts(s, y, g):
                H_g[name].add(s, y)
        path.append(at.clone())
    return torch.stack(path)
