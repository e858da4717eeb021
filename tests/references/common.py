"""What every reference shares: networks, batches, a flat parameter vector, and SGD written out.

A reference is a module named as its recipe, with

    NETS        the networks of `NETWORKS` that it is run on
    VARIANTS    {name: (overrides of the recipe, the same for `train`)}; "default" is the recipe as it stands
    STEPS       how many steps
    TOLERANCE   absolute and relative, in float64
    train(network, batches, drawn, **options) -> (STEPS, P), theta after every step
    CONTROLS    optional: options of `train` each of which makes other steps, as a test shows
    ONLY        optional: {variant: the networks it is run on}

`drawn` holds what the run under test drew, in order, for references that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import dense
import nets

Batch = tuple[Tensor, Tensor]


@dataclass
class Drawn:
    """What the run under test drew, in order.

    labels: (N,) classes, one entry an observation. probes: (samples, P) vectors v, likewise. Of `psgd`, an entry each update of a block: noise (m, n)
    beside h; factors, the first U and V (n, r) of a low-rank Q, once a block; moves, whether it is U that moves. coordinates: of sketched layers, an
    entry each refresh of a block, by name.
    """

    labels: list[Tensor] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    moves: list[bool] = field(default_factory=list)
    coordinates: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Network:
    """A network with its criterion, and the data of step `t`."""

    make: Callable[[], nn.Module]
    criterion: nn.Module
    batch: Callable[[int], Batch]

    def batches(self, steps: int) -> list[Batch]:
        return [self.batch(step) for step in range(steps)]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip


def _square() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def _classes(*shape: int) -> Callable[[int], Batch]:
    return lambda step: (nets.normal(*shape, seed=10 + step), nets.labels(3, shape[0], seed=50 + step))


NETWORKS = {
    "mlp": Network(lambda: nets.seeded(_mlp), nn.CrossEntropyLoss(), _classes(8, 4)),
    "conv": Network(lambda: nets.seeded(_conv), nn.CrossEntropyLoss(), _classes(5, 2, 4, 4)),
    "linear": Network(
        lambda: nets.seeded(lambda: nn.Linear(3, 2)), nn.MSELoss(), lambda t: (nets.normal(12, 3, seed=10 + t), nets.normal(12, 2, seed=50 + t))
    ),
    # fewer examples than a unit has inputs
    "wide": Network(
        lambda: nets.seeded(lambda: nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))), nn.CrossEntropyLoss(), _classes(4, 9)
    ),
    # a convolution whose gradients by example are more numbers than its inputs and output gradients
    "channels": Network(
        lambda: nets.seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))),
        nn.CrossEntropyLoss(), _classes(5, 4, 2, 2),
    ),
    # every gradient has full rank, so that no second moment of one has a null space
    "square": Network(
        lambda: nets.seeded(_square), nn.MSELoss(), lambda t: (nets.normal(8, 3, seed=10 + t), nets.normal(8, 3, seed=50 + t))
    ),
}


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in dense.parameters(model)])


def move(model: nn.Module, to: Tensor) -> None:
    """Put theta into the model."""
    torch.nn.utils.vector_to_parameters(to, dense.parameters(model))


def descend(
    network: Network, batches: list[Batch], direction: Callable[[nn.Module, int, Batch, Tensor], Tensor], *, lr: float, momentum: float = 0.0
) -> Tensor:
    """b <- momentum b + d, theta <- theta - lr b with d = direction(model, step, batch, gradient); theta after every step."""
    model, path = network.make(), []
    at, buffer = theta(model), torch.zeros_like(theta(model))
    for step, batch in enumerate(batches):
        gradient = dense.gradient(model, network.criterion, *batch)
        buffer = momentum * buffer + direction(model, step, batch, gradient)
        at = at - lr * buffer
        move(model, at)
        path.append(at.clone())
    return torch.stack(path)
