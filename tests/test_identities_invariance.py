"""Identity 29: what a step does not depend on (float64), each with cases in which it does.

- An undamped natural-gradient step commutes with an affine change of parameters; a damped one and a plain gradient do not.
- An undamped K-FAC step gives the same function after invertible affine maps of the inputs and outputs of each layer; damped, by the unit,
  by the tensor's dimensions or by the diagonal it does not.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dense
import precond
from nets import normal, seeded
from precond.damping import Factored

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
LR = 0.1


def apart(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * b.norm())


class Mapped(nn.Module):
    """A network whose parameters are T theta + t, theta one vector."""

    def __init__(self, inner: nn.Module, T: Tensor, t: Tensor) -> None:
        super().__init__()
        self.inner, self.T, self.t = [inner], T, t  # in a list: no parameter of the network is one of ours
        flat = torch.cat([p.detach().flatten() for p in inner.parameters()])
        self.theta = nn.Parameter(torch.linalg.solve(T, flat - t))

    def forward(self, x: Tensor) -> Tensor:
        named = dict(self.inner[0].named_parameters())
        pieces = (self.T @ self.theta + self.t).split([p.numel() for p in named.values()])
        values = {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}
        return torch.func.functional_call(self.inner[0], values, (x,))


def direction(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, repr: str, damping: Any) -> Tensor:
    C = precond.curvature(model, criterion, x, y, matrix="fisher", repr=repr)
    return precond.inverse(C, solver="cholesky", damping=damping) @ dense.gradient(model, criterion, x, y)


def test_29_a_natural_gradient_step_does_not_depend_on_the_parametrisation() -> None:
    """The weights of this seed, doubled, give a Fisher matrix of condition 1e3, so that rounding stays below the tolerance."""
    model, criterion = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), 5), nn.MSELoss()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    x, y, P = normal(20, 2), normal(20, 1), 9
    T = torch.eye(P, dtype=torch.float64) + 0.3 * normal(P, P, seed=3)
    mapped = Mapped(model, T, normal(P, seed=4))
    close(mapped(x), model(x))
    close(T @ direction(mapped, criterion, x, y, "full", 0.0), direction(model, criterion, x, y, "full", 0.0))
    assert apart(T @ direction(mapped, criterion, x, y, "full", 0.1), direction(model, criterion, x, y, "full", 0.1))
    assert apart(T @ dense.gradient(mapped, criterion, x, y), dense.gradient(model, criterion, x, y))


class Between(nn.Module):
    """A fixed affine map."""

    def __init__(self, M: Tensor, m: Tensor) -> None:
        super().__init__()
        self.M, self.m = M, m

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.M.T + self.m


def maps(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return torch.eye(n, dtype=torch.float64) + 0.3 * normal(n, n, seed=seed), normal(n, seed=seed + 1)


def rewritten(model: nn.Sequential) -> nn.Sequential:
    """The same function: each Linear reads an affine map of its input, and an affine map of its output is what it was."""
    made: list[nn.Module] = []
    for i, module in enumerate(model):
        if not isinstance(module, nn.Linear):
            made.append(module)
            continue
        (Om, om), (Ph, ph) = maps(module.in_features, 10 * i + 1), maps(module.out_features, 10 * i + 5)
        new = copy.deepcopy(module)
        with torch.no_grad():
            new.weight.copy_(torch.linalg.solve(Ph, module.weight) @ torch.linalg.inv(Om))
            new.bias.copy_(torch.linalg.solve(Ph, module.bias - ph) - new.weight @ om)
        made += [Between(Om, om), new, Between(Ph, ph)]
    return nn.Sequential(*made)


def stepped(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, repr: str, damping: Any) -> Tensor:
    """The output after one step."""
    step, model = direction(model, criterion, x, y, repr, damping), copy.deepcopy(model)
    with torch.no_grad():
        for p, part in zip(model.parameters(), step.split([p.numel() for p in model.parameters()]), strict=True):
            p.sub_(LR * part.view(p.shape))
    return model(x).detach()


def test_29_a_kfac_step_does_not_depend_on_affine_maps_around_a_layer() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    other, criterion, x, y = rewritten(model), nn.MSELoss(), normal(20, 3), normal(20, 2)
    close(other(x), model(x))
    close(stepped(other, criterion, x, y, "kron_io", 0.0), stepped(model, criterion, x, y, "kron_io", 0.0))
    for repr, damping in (("kron_io", Factored(0.1)), ("unit", 0.0), ("kron_dim", 1e-6), ("diagonal", 0.0)):
        assert apart(stepped(other, criterion, x, y, repr, damping), stepped(model, criterion, x, y, repr, damping))
