"""Claims against `pytorch_optimizer` (Apache-2.0), step by step in float64: `shampoo` and `soap`.

Where it differs from the recipes, and what the comparison does about it. Shampoo:

* momentum mixes the gradient with the last direction before it is preconditioned, which no paper has: both run without momentum;
* roots are made at calls t with t a multiple of the interval, counted from 1, and are zero before: every step here;
* roots come from an SVD, and eps is in the first moment, as in the recipe.

SOAP:

* the QR factorisation is made in float32: its module is shown a `torch` whose float32 is float64;
* eps is added to the root before its bias correction, m / (sqrt(v) + eps) sqrt(1 - b^t) / (1 - b^t): eps is 0 here, in both;
* weight decay comes after the step, on the new parameters: there is none here;
* the first call makes the basis and moves nothing, vectors included, as in the recipe. The network's gradients have full rank, since a null space has
  no basis of its own.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from oracles.peers import close
from precond.damping import Outside
from precond.history import Sum
from precond.representations import KronEigen
from precond.transforms import Momentum
from references.common import NETWORKS


class _Wide:
    """torch, with float64 for float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _peer(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"pytorch_optimizer.optimizer.{module}")


def _path(net: str, model: nn.Module, optimizer: Any, steps: int) -> Tensor:
    path, network = [], NETWORKS[net]
    for inputs, targets in network.batches(steps):
        optimizer.zero_grad()
        network.criterion(model(inputs), targets).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(path)


def _ours(recipe: str, net: str, steps: int, lr: float, **arguments: Any) -> Tensor:
    model = NETWORKS[net].make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with precond.recipe(recipe, **arguments).attach(model, optimizer=optimizer):
        return _path(net, model, optimizer, steps)


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_shampoo(net: str) -> None:
    model = NETWORKS[net].make()
    theirs = _path(net, model, _peer("shampoo").Shampoo(model.parameters(), lr=0.1, matrix_eps=1e-2), 8)
    close(_ours("shampoo", net, 8, 0.1, history=Sum(1e-2)), theirs)
    assert (_ours("shampoo", net, 8, 0.1, history=Sum(1.01e-2)) - theirs).abs().max() > 1e-5


@pytest.mark.parametrize(("interval", "max_dim", "betas"), [(3, 10000, (0.95, 0.95)), (1, 10000, (0.9, 0.95)), (2, 2, (0.95, 0.95))])
def test_soap(interval: int, max_dim: int, betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    peer, model = _peer("soap"), NETWORKS["square"].make()
    monkeypatch.setattr(peer, "torch", _Wide())
    optimizer = peer.SOAP(
        model.parameters(), lr=3e-3, betas=betas, eps=0.0, weight_decay=0.0, precondition_frequency=interval, max_precondition_dim=max_dim
    )
    theirs = _path("square", model, optimizer, 12)

    def ours(interval: int) -> Tensor:
        repr = KronEigen(basis_of="dim", basis="qr", basis_interval=interval, update="after", max_dim=max_dim, vectors=False, oversized="identity")
        return _ours("soap", "square", 12, 3e-3, repr=repr, damping=Outside(0.0), transforms=[Momentum(betas[0])])

    close(ours(interval), theirs)
    if max_dim > 2:
        assert (ours(interval + 3) - theirs).abs().max() > 1e-6
