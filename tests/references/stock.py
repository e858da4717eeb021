"""The steps of a stock optimizer of torch, for the recipes that torch has itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from references.common import Batch, Network, theta


def run(network: Network, batches: list[Batch], make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
    model, path = network.make(), []
    optimizer = make(list(model.parameters()))
    for inputs, targets in batches:
        optimizer.zero_grad()
        network.criterion(model(inputs), targets).backward()
        optimizer.step()
        path.append(theta(model))
    return torch.stack(path)
