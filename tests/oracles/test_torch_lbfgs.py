"""L-BFGS beside `torch.optim.LBFGS`, which is in torch itself.

- On one batch with a fixed step the recipe without Powell's damping makes the same steps as torch's class with one iteration a call and no line
  search, whatever the memory. torch shortens the first step to lr min(1, 1 / |g|_1); the loop here gives the recipe that rate.
- With Powell's damping, or another memory, it does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import precond
from references.common import NETWORKS, theta

STEPS, LR = 12, 0.5


def theirs(memory: int, net: str) -> Tensor:
    network = NETWORKS[net]
    model, (inputs, targets), path = network.make(), network.batch(0), []
    options: dict[str, Any] = {"max_iter": 1, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS(model.parameters(), lr=LR, history_size=memory, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = network.criterion(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        path.append(theta(model))
    return torch.stack(path)


def ours(memory: int, net: str, powell: float = 0.0) -> Tensor:
    network = NETWORKS[net]
    model, (inputs, targets), path = network.make(), network.batch(0), []
    triple: Any = precond.recipe("lbfgs").triple
    members: dict[str, Any] = {
        "matrix": dataclasses.replace(triple.matrix, powell=powell), "repr": dataclasses.replace(triple.repr, memory=memory)
    }  # fmt: skip
    optimizer = precond.load_recipe("lbfgs").optimizer(model.parameters(), lr=LR)
    precond.recipe("lbfgs", **members).attach(model, network.criterion, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        network.criterion(model(inputs), targets).backward()
        size = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
        optimizer.param_groups[0]["lr"] = LR if step else LR * min(1.0, 1 / size)
        optimizer.step()
        path.append(theta(model))
    return torch.stack(path)


@pytest.mark.parametrize("net", ["mlp", "linear", "square"])
@pytest.mark.parametrize("memory", [2, 10])
def test_the_recipe_makes_the_steps_of_torch(memory: int, net: str) -> None:
    expected = theirs(memory, net)
    torch.testing.assert_close(ours(memory, net), expected, rtol=1e-10, atol=1e-10)
    assert (ours(memory + 1, net) - expected).abs().max() > 1e-6 or memory == 10


def test_powells_damping_makes_other_steps() -> None:
    assert (ours(10, "mlp", powell=0.9) - theirs(10, "mlp")).abs().max() > 1e-3
