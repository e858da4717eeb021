"""Claims about activation checkpointing: without reentrance it takes the same steps as no checkpointing, for every kind of observation, with
dropout inside and with a batched nested pass through it; with reentrance, which hides the graph, it is refused with the call to write.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nets import seeded
from precond import ObservationError
from training import KINDS, fit, make, same

every = pytest.mark.parametrize("kind", KINDS)


class Checkpointed(nn.Module):
    """4 - 5 - 5 - 3, the middle of it checkpointed or not."""

    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(4, 5)
        self.middle = nn.Sequential(nn.Tanh(), nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(5, 5), nn.Tanh())
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.middle(h) if self.reentrant is None else checkpoint(self.middle, h, use_reentrant=self.reentrant)
        return self.last(h)


def run(kind: str, reentrant: bool | None, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)  # the masks of the forward passes
    return fit(KINDS[kind](), build=lambda: seeded(lambda: Checkpointed(reentrant, dropout)))


@every
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_reentrance_it_takes_the_same_steps(kind: str, dropout: float) -> None:
    same(run(kind, False, dropout), run(kind, None, dropout))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("shampoo", "adam")])
def test_with_reentrance_it_is_refused(kind: str) -> None:
    with pytest.raises(ObservationError, match=r"reentrant activation checkpointing.*checkpoint\(\.\.\., use_reentrant=False\)"):
        run(kind, True)


@pytest.mark.parametrize("kind", ["shampoo", "adam"])
def test_with_reentrance_what_needs_only_gradients_works(kind: str) -> None:
    same(run(kind, True), run(kind, None))


def test_a_model_that_is_one_checkpoint() -> None:
    class Whole(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            def inside(x: Tensor) -> Any:
                return self.last(self.middle(self.first(x)))

            return inside(x) if self.reentrant is None else checkpoint(inside, x, use_reentrant=self.reentrant)

    for repr in ("full", "kron_io"):
        same(*(fit(make(repr=repr), build=lambda r=r: seeded(lambda: Whole(r))) for r in (False, None)))
