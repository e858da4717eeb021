"""Claims against `torch.optim.Muon`, step by step in float64: both rules for the step size, with and without Nesterov, with decoupled weight decay.

Where it differs from the recipe, and what the comparison does about it:

* it iterates in bfloat16: the cast is made a copy here; uncast, the two agree to bfloat16's digits only, which is asserted too;
* it divides by max(|U|, eps), the published code and the recipe by |U| + 1e-7: the loss is multiplied by 1e9, which moves neither and makes 1e-7 nothing;
* it takes matrices only: the networks have no biases;
* it iterates on U and the solver on U U^T, which is the same polynomial.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from nets import labels, normal, seeded
from oracles.peers import close
from precond.transforms import Momentum, ShapeScale


def _net() -> nn.Module:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 7, bias=False), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))

    return seeded(make)


def _path(optimizer: Any, model: nn.Module) -> Tensor:
    path, criterion = [], nn.CrossEntropyLoss()
    for t in range(8):
        optimizer.zero_grad()
        (1e9 * criterion(model(normal(6, 4, seed=t)), labels(3, 6, seed=t))).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(path)


def _ours(transforms: list[Any], **options: float) -> Tensor:
    model = _net()
    optimizer = precond.load_recipe("muon").optimizer(model.parameters(), **options)
    with precond.recipe("muon", transforms=transforms).attach(model, optimizer=optimizer):
        return _path(optimizer, model)


@pytest.mark.parametrize(("rule", "scale"), [("original", ShapeScale()), ("match_rms_adamw", ShapeScale("rms", 0.2))])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_equal_torchs(rule: str, scale: ShapeScale, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> Tensor:
        model = _net()
        return _path(torch.optim.Muon(model.parameters(), lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=rule), model)

    ours = _ours([Momentum(0.95, debias=False, nesterov=nesterov), scale], lr=0.02, weight_decay=0.1)
    rounded = theirs()
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    close(ours, theirs())
    assert 1e-6 < (ours - rounded).abs().max() < 0.02


def test_another_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    model = _net()
    stock = _path(torch.optim.Muon(model.parameters(), lr=0.02, weight_decay=0.0), model)
    close(_ours([Momentum(0.95, debias=False, nesterov=True), ShapeScale()]), stock)
    for other in ([Momentum(0.95, debias=False, nesterov=True)], [Momentum(0.9, debias=False, nesterov=True), ShapeScale()]):
        assert (_ours(other) - stock).abs().max() > 1e-3
