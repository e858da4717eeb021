"""Claims about values that are not finite, for K-FAC, Shampoo, Adam, Hessian-free and the natural gradient:

- a NaN or Inf in a gradient, an activation, or the loss at step k reaches no parameter through us and no statistic or state ever; it is
  counted, and training goes on from where it was: the next steps are those of a run that never saw the bad batch;
- "zero" sets the direction of the bad blocks to zero, and the others move; "skip" leaves p.grad None everywhere; "raise" raises, by block;
- a dead layer, whose gradients are all zeros, and a batch whose terms are all ignored, are no failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond import Preconditioner
from training import batches, make, net, plain, sgd, theta

RUNS: dict[str, Callable[..., Preconditioner]] = {
    "kfac": lambda **o: precond.recipe("kfac", seed=0, damping=0.1, **{"solver_interval": 1, **o}),
    "kfac_rarely": lambda **o: precond.recipe("kfac", seed=0, damping=0.1, **{"solver_interval": 10, **o}),
    "shampoo": lambda **o: precond.recipe("shampoo", **{"solver_interval": 1, **o}),
    "adam": lambda **o: precond.recipe("adam", **o),
    "hessian_free": lambda **o: precond.recipe("hessian_free", **o),
    "natural_gradient": lambda **o: precond.recipe("natural_gradient", damping=0.1, **o),
    "kflr": lambda **o: make(repr="kron_io", history=0.9, **o),
    "empirical": lambda **o: make("empirical_fisher", "layer", history=0.9, **o),
    "newton": lambda **o: make("hessian", "full", "lu", 2.0, **o),
    "window": lambda **o: make(repr="layer", history=precond.history.Window(3), **o),
}
every = pytest.mark.parametrize("name", RUNS)
BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
PLACES = ("gradient", "activation", "input", "loss")


class Poison(nn.Tanh):
    """Multiplies one activation, where it is told to."""

    value = 1.0

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.ones_like(x)
        factor[0, 0] = self.value
        return super().forward(x) * factor


def built() -> nn.Module:
    model = net()
    model[1] = Poison()
    return model


def poisoned(place: str, bad: float, model: nn.Module, criterion: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """One step of the plain loop with a bad value in one place."""
    optimizer.zero_grad()
    if place == "input":
        x = x.clone()
        x[0, 0] = bad
    model[1].value = bad if place == "activation" else 1.0
    loss = criterion(model(x), y) * (bad if place == "loss" else 1.0)
    model[1].value = 1.0
    loss.backward()
    if place == "gradient":
        model[0].weight.grad[0, 0] = bad
    optimizer.step()


def leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)


def clean(preconditioner: Preconditioner, model: nn.Module) -> bool:
    """No parameter, statistic, solver state or transform holds a value that is not finite."""
    return all(bool(t.isfinite().all()) for t in [theta(model), *leaves(preconditioner.state_dict())])


@every
@pytest.mark.parametrize("place", PLACES)
@BAD
@pytest.mark.parametrize("k", [0, 2])
def test_a_bad_value_reaches_nothing_is_counted_and_training_goes_on(name: str, place: str, bad: float, k: int) -> None:
    model, criterion, preconditioner = built(), nn.CrossEntropyLoss(), RUNS[name]()
    optimizer = sgd(model, lr=0.01)
    preconditioner.attach(model, criterion, optimizer)
    for step, (x, y) in enumerate(batches(6)):
        before = theta(model)
        if step == k:
            poisoned(place, bad, model, criterion, optimizer, x, y)
            assert preconditioner.diagnostics["directions_zeroed"] + preconditioner.diagnostics["solves_failed"] > 0
        else:
            plain(model, criterion, optimizer, x, y)
            assert not torch.equal(theta(model), before)
        assert clean(preconditioner, model)
    assert preconditioner.diagnostics["steps"] == 6


@pytest.mark.parametrize("name", ["kflr", "empirical", "window", "shampoo", "natural_gradient", "hessian_free", "newton"])
@pytest.mark.parametrize("place", ["activation", "loss"])
@BAD
def test_the_next_steps_are_those_of_a_run_that_never_saw_the_bad_batch(name: str, place: str, bad: float) -> None:
    after = []
    for seen in (True, False):
        model, criterion, preconditioner = built(), nn.CrossEntropyLoss(), RUNS[name]()
        optimizer = sgd(model, lr=0.01)
        preconditioner.attach(model, criterion, optimizer)
        for step, (x, y) in enumerate(batches(5)):
            if step == 2:
                if seen:
                    poisoned(place, bad, model, criterion, optimizer, x, y)
            else:
                plain(model, criterion, optimizer, x, y)
        after.append(theta(model))
    torch.testing.assert_close(*after, rtol=1e-10, atol=1e-10)


def bad_gradient_in_first_layer(name: str, **options: Any) -> tuple[Preconditioner, nn.Module, Tensor]:
    model, criterion, preconditioner = built(), nn.CrossEntropyLoss(), RUNS[name](**options)
    optimizer = sgd(model, lr=0.01)
    preconditioner.attach(model, criterion, optimizer)
    first, second = batches(2)
    plain(model, criterion, optimizer, *first)
    before = theta(model)
    poisoned("gradient", float("nan"), model, criterion, optimizer, *second)
    return preconditioner, model, before


@pytest.mark.parametrize("name", ["kflr", "empirical", "adam", "shampoo"])
def test_zero_stops_the_bad_block_and_moves_the_others(name: str) -> None:
    preconditioner, model, before = bad_gradient_in_first_layer(name, on_nonfinite="zero")
    moved = theta(model) != before
    assert not bool(moved[:20].any()) and bool(moved[25:].all())
    assert preconditioner.diagnostics["directions_zeroed"] == 1


@every
def test_skip_skips_the_whole_step(name: str) -> None:
    preconditioner, model, before = bad_gradient_in_first_layer(name, on_nonfinite="skip")
    assert torch.equal(theta(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert preconditioner.diagnostics["steps_skipped"] == 1
    assert preconditioner.diagnostics["directions_zeroed"] == 0


@every
def test_raise_raises_and_names_block_and_step(name: str) -> None:
    block = {"hessian_free": "model", "natural_gradient": "model", "newton": "model", "shampoo": r"0\.weight", "adam": "0"}.get(name, "0")
    with pytest.raises(FloatingPointError, match=rf"the gradient or direction of {block}.* is not finite at step 1"):
        bad_gradient_in_first_layer(name, on_nonfinite="raise")


@every
@pytest.mark.parametrize("on_nonfinite", ["zero", "skip", "raise"])
def test_finite_training_does_not_depend_on_the_setting(name: str, on_nonfinite: str) -> None:
    after = []
    for options in ({}, {"on_nonfinite": on_nonfinite}):
        model, criterion, preconditioner = built(), nn.CrossEntropyLoss(), RUNS[name](**options)
        optimizer = sgd(model, lr=0.01)
        preconditioner.attach(model, criterion, optimizer)
        for x, y in batches(2):
            plain(model, criterion, optimizer, x, y)
        after.append(theta(model))
        counted = {n: preconditioner.diagnostics[n] for n in ("directions_zeroed", "steps_skipped", "observations_dropped", "solves_failed", "blocks_kept")}
        assert not any(counted.values()), counted
    assert torch.equal(*after)


def dead() -> nn.Module:
    """The first layer's output is cut off by a ReLU, so that nothing comes back to it."""
    model = net()
    model[1] = nn.ReLU()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    return model


@every
def test_a_dead_layer_is_no_failure(name: str) -> None:
    model, criterion, preconditioner = dead(), nn.CrossEntropyLoss(), RUNS[name]()
    optimizer = sgd(model, lr=0.01)
    preconditioner.attach(model, criterion, optimizer)
    start = theta(model)
    for x, y in batches(3):
        plain(model, criterion, optimizer, x, y)
    assert clean(preconditioner, model)
    moved = theta(model) != start
    assert not bool(moved[:40].any()) and bool(moved[40:].all())  # the last weight is multiplied by zeros; its bias learns
    assert preconditioner.diagnostics["directions_zeroed"] == preconditioner.diagnostics["blocks_kept"] == 0


@every
def test_a_batch_without_a_term_moves_nothing(name: str) -> None:
    """All targets ignored: the loss, a mean of nothing, is NaN, its gradient zero; Adam's momentum goes on."""
    model, criterion, preconditioner = built(), nn.CrossEntropyLoss(), RUNS[name]()
    optimizer = sgd(model, lr=0.01)
    preconditioner.attach(model, criterion, optimizer)
    (x, y), (z, _) = batches(2)
    plain(model, criterion, optimizer, x, y)
    before = theta(model)
    plain(model, criterion, optimizer, z, torch.full((6,), -100))
    assert torch.equal(theta(model), before) or name == "adam"
    assert clean(preconditioner, model)
