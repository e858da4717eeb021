"""Rule 11 claims, of a model that changes after `attach`:

- a parameter frozen, unfrozen, swapped or added is noticed, and the step is that of a preconditioner attached to the model as it is now;
- blocks that stay keep their statistics, blocks that go are forgotten; a parameter left without a gradient in a step stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import precond
from training import EXACT, KINDS, batches, make, matrix_of, net, of, plain, same, sgd

every = pytest.mark.parametrize("kind", KINDS)
Change = Callable[[nn.Module], None]


def frozen(*names: str) -> Change:
    def change(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(name not in names)
            p.grad = None

    return change


def swapped(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach() * 1.5)


def added(model: nn.Module) -> None:
    model[0].bias = nn.Parameter(torch.full((5,), 0.1, dtype=torch.float64))


def without_bias() -> nn.Module:
    model = net()
    model[0].bias = None
    return model


CHANGES: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "freeze_a_weight": (net, frozen("0.weight")),
    "freeze_a_layer": (net, frozen("0.weight", "0.bias")),
    "freeze_a_bias": (net, frozen("2.bias")),
    "unfreeze_a_layer": (lambda: (m := net(), frozen("0.weight", "0.bias")(m))[0], frozen()),
    "unfreeze_a_bias": (lambda: (m := net(), frozen("2.bias")(m))[0], frozen()),
    "swap_a_weight": (net, swapped),
    "add_a_bias": (without_bias, added),
}


def run(kind: str, build: Callable[[], nn.Module], change: Change, early: bool, steps: int = 1) -> nn.Module:
    """Attach before the change, or after it."""
    model, criterion, preconditioner = build(), nn.CrossEntropyLoss(), KINDS[kind]()
    if early:
        preconditioner.attach(model, criterion)
    change(model)
    if not early:
        preconditioner.attach(model, criterion)
    optimizer = sgd(model)
    for x, y in batches(steps):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        preconditioner.step()
        optimizer.step()
    return model


@every
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_planned_again(kind: str, change: str) -> None:
    same(run(kind, *CHANGES[change], early=True, steps=3), run(kind, *CHANGES[change], early=False, steps=3))


@every
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_between_steps_is_planned_again(kind: str, change: str) -> None:
    build, apply = CHANGES[change]
    model, criterion, preconditioner = build(), nn.CrossEntropyLoss(), KINDS[kind]()
    preconditioner.attach(model, criterion)
    for k, (x, y) in enumerate(batches(4)):
        if k == 2:
            apply(model)
        optimizer = sgd(model)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        preconditioner.step()
        optimizer.step()
    listed = {row.parameter for row in preconditioner.describe().rows}
    assert listed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_blocks_that_stay_keep_their_statistics() -> None:
    model, criterion, preconditioner = net(), nn.CrossEntropyLoss(), make(repr="layer", history=0.5)
    optimizer, (first, second) = sgd(model, lr=0.0), batches(2)
    preconditioner.attach(model, criterion, optimizer)
    plain(model, criterion, optimizer, *first)
    frozen("0.weight", "0.bias")(model)
    plain(model, criterion, optimizer, *second)
    C = of("ggn")
    frozen()(model)  # for the oracle, which takes trainable parameters only
    expected = (0.25 * C(model, *first) + 0.5 * C(model, *second))[25:, 25:] / 0.75
    assert_close(matrix_of(preconditioner, "2"), expected, **EXACT)
    assert list(preconditioner.operators) == ["2"]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("repr", ["layer", "auto"])
def test_a_pass_on_the_callers_own_tensors_is_no_change(repr: str, trained: bool) -> None:
    """`functional_call`, between steps and between a forward pass and its backward pass."""

    def train(own: bool, change: Change | None = None) -> nn.Module:
        model, criterion, preconditioner = net(), nn.CrossEntropyLoss(), make(repr=repr, history=0.5)
        optimizer = sgd(model)
        preconditioner.attach(model, criterion, optimizer)
        for x, y in batches(3):
            mine = {n: (2 * p.detach()).requires_grad_(trained) for n, p in model.named_parameters()}
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            if own:
                torch.func.functional_call(model, mine, (x,))
            loss.backward()
            optimizer.step()
            if own:
                torch.func.functional_call(model, mine, (2 * x,))
            if change is not None:
                change(model)
        return model

    same(train(True), train(False))
    with pytest.raises(AssertionError):  # control: a parameter that is swapped is one
        same(train(True, swapped), train(False))


def test_a_plan_that_fails_leaves_the_hooks() -> None:
    model, criterion, preconditioner = net(), nn.CrossEntropyLoss(), make(repr="layer")
    optimizer, data = sgd(model), batches(1)
    preconditioner.attach(model, criterion, optimizer)
    frozen(*dict(model.named_parameters()))(model)
    with pytest.raises(precond.UsageError, match="no trainable parameters"):
        model(data[0][0])
    frozen()(model)
    plain(model, criterion, optimizer, *data[0])
    fresh = net()
    optimizer = sgd(fresh)
    make(repr="layer").attach(fresh, criterion, optimizer)
    plain(fresh, criterion, optimizer, *data[0])
    same(model, fresh)


@every
def test_a_parameter_without_a_gradient_this_step_stays(kind: str) -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = net()
            self.first, self.second, self.other = inner[0], inner[2], nn.Linear(4, 5).double()
            self.use_other = False

        def forward(self, x: Any) -> Any:
            return self.second(torch.tanh(self.other(x) if self.use_other else self.first(x)))

    model, criterion, preconditioner = Switched(), nn.CrossEntropyLoss(), KINDS[kind]()
    optimizer = sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    for k, (x, y) in enumerate(batches(4)):
        model.use_other = k % 2 == 1
        idle = model.first if model.use_other else model.other
        before = [p.detach().clone() for p in idle.parameters()]
        plain(model, criterion, optimizer, x, y)
        assert all(p.grad is None for p in idle.parameters())
        assert_close([p.detach() for p in idle.parameters()], before, rtol=0, atol=0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
