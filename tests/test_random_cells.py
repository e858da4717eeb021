"""What the table of combinations claims: a cell that is called valid trains.

* 200 cells drawn from all valid ones each take 3 steps on a small convolutional and on a small attention model: no error, no failure
  counted, every parameter finite, the model moved, and not as by SGD alone. The full run takes all of them.
* The draw reaches every member of every axis.
* Negative controls: the counters that the test reads do see a cell that breaks down, and the comparison with SGD one that does nothing.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import precond
from nets import labels, normal, seeded

DRAWN = 200
STEPS = 3
CHAIN_ONLY = "ggn_recursive"
"""Defined for a chain of layers alone, and refused on a model with attention."""
NO_FAILURE = ("observations_dropped", "blocks_kept", "directions_zeroed", "solves_failed", "steps_skipped", "steps_rejected")


class Attention(nn.Module):
    """Tokens, positions, one block of attention with a residual, a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.positions = nn.Parameter(0.1 * torch.randn(5, 4))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        y = self.norm(x)
        out: Tensor = self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))
        return out


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutional": (_convolutional, lambda step: normal(6, 1, 7, 7, seed=step)),
    "attention": (Attention, lambda step: labels(7, 6, 5, seed=step)),
}
VALID = [(c.matrix, c.repr, c.solver) for c in precond.combinations() if c.valid]


def _reaching(cells: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The same cells, those first that have a member of an axis which no cell before them has."""
    seen: set[tuple[int, str]] = set()
    first, rest = [], []
    for cell in cells:
        members = set(enumerate(cell))
        (rest if members <= seen else first).append(cell)
        seen |= members
    return first + rest


ORDER = _reaching(random.Random(0).sample(VALID, len(VALID)))
CELLS = [pytest.param(*cell, id="-".join(cell), marks=() if i < DRAWN else pytest.mark.slow) for i, cell in enumerate(ORDER)]


def _train(model: nn.Module, inputs: Callable[[int], Tensor], preconditioner: precond.Preconditioner | None) -> dict[str, int]:
    """The counters after the steps of the ordinary loop."""
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.05)
    with preconditioner.attach(model, criterion, optimizer) if preconditioner else nullcontext():
        for step in range(STEPS):
            optimizer.zero_grad()
            criterion(model(inputs(step)), labels(3, 6, seed=9 + step)).backward()
            optimizer.step()
        return dict(preconditioner.diagnostics) if preconditioner else {}


@functools.cache
def _by_sgd(name: str) -> nn.Module:
    make, inputs = MODELS[name]
    model = seeded(make)
    _train(model, inputs, None)
    return model


def _alike(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:layer .* keeps its plain gradient:UserWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("matrix", "repr", "solver"), CELLS)
def test_a_valid_cell_trains(matrix: str, repr: str, solver: str, name: str) -> None:
    preconditioner = precond.Preconditioner(matrix=matrix, repr=repr, solver=solver, damping=0.1, seed=0)
    make, inputs = MODELS[name]
    model, before = seeded(make), seeded(make)
    if matrix == CHAIN_ONLY and name == "attention":
        with pytest.raises(precond.PrecondError):
            _train(model, inputs, preconditioner)
        return
    counts = _train(model, inputs, preconditioner)
    assert counts["steps"] == STEPS
    assert [key for key in NO_FAILURE if counts[key]] == []
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert counts["refreshes"] > 0
    assert not _alike(model, _by_sgd(name))


def test_the_draw_reaches_every_member() -> None:
    drawn = ORDER[:DRAWN]
    for axis, names in enumerate((precond.matrices.names(), precond.representations.names(), precond.solvers.names())):
        assert {cell[axis] for cell in drawn} == set(names)


def test_a_cell_that_breaks_down_is_counted() -> None:
    counts = _train(
        seeded(_convolutional),
        lambda step: normal(6, 1, 7, 7, seed=step) * float("nan"),
        precond.Preconditioner(matrix="empirical_fisher", repr="layer", solver="cholesky", damping=0.1, seed=0),
    )
    assert [key for key in NO_FAILURE if counts[key]]


@pytest.mark.parametrize("name", MODELS)
def test_a_cell_that_does_nothing_is_seen(name: str) -> None:
    make, inputs = MODELS[name]
    for start in (STEPS, STEPS - 1):
        model = seeded(make)
        _train(model, inputs, precond.Preconditioner(matrix="empirical_fisher", repr="layer", solver="cholesky", damping=0.1, seed=0, start_step=start))
        assert _alike(model, _by_sgd(name)) == (start == STEPS)
