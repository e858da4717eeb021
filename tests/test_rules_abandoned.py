"""Rule 2 claims, of gradients that were thrown away:

- a backward pass whose gradients were zeroed (set to None or to 0) leaves nothing in the next step, nor does one that raised;
- the same of a step that a GradScaler skipped because of an inf; the statistics never hold it;
- forward passes and losses that nobody differentiated, and evaluation between the steps, count for nothing;
- a step that follows zeroed gradients with accumulation still counts every micro-batch.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from precond.observe.observer import Observer
from training import KINDS, Loop, differ, fit, make, plain, same, theta

every = pytest.mark.parametrize("kind", KINDS)
to_none = pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "to_zero"])


def abandoning(to_none: bool, micro_batches: int = 1) -> Loop:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=to_none)
        criterion(model(x + 1), y).backward()
        optimizer.zero_grad(set_to_none=to_none)
        for xi, yi in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (criterion(model(xi), yi) / micro_batches).backward()
        optimizer.step()

    return loop


@every
@to_none
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_abandoned_step_leaves_nothing(kind: str, to_none: bool, micro_batches: int) -> None:
    same(fit(KINDS[kind](), abandoning(to_none, micro_batches)), fit(KINDS[kind]()))


@to_none
def test_an_abandoned_step_that_is_not_forgotten_would_be_seen(to_none: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit(make())
    monkeypatch.setattr(Observer, "_abandoned", lambda self, params: False)
    differ(fit(make(), abandoning(to_none)), expected)


@every
@to_none
def test_zeroing_to_none_or_to_zero_is_the_same(kind: str, to_none: bool) -> None:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=to_none)
        criterion(model(x), y).backward()
        optimizer.step()

    same(fit(KINDS[kind](), loop), fit(KINDS[kind]()))


@every
@to_none
def test_a_step_that_the_scaler_skipped_leaves_nothing(kind: str, to_none: bool) -> None:
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=1024.0), []

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        for factor in (float("inf"), 1.0):
            optimizer.zero_grad(set_to_none=to_none)
            before = theta(model)
            scaler.scale(criterion(model(x if factor == 1.0 else x + 1), y) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append(bool((theta(model) == before).all()))

    preconditioner = KINDS[kind]()
    same(fit(preconditioner, loop), fit(KINDS[kind]()))
    assert seen == [True, False] * 3
    assert preconditioner.diagnostics["steps"] == 3
    assert preconditioner.diagnostics["observations_dropped"] == preconditioner.diagnostics["directions_zeroed"] == 0


@every
def test_a_backward_pass_that_raised_leaves_nothing(kind: str) -> None:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        handle = model[0].weight.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            criterion(model(x + 1), y).backward()
        handle.remove()
        optimizer.zero_grad()
        plain(model, criterion, optimizer, x, y)

    same(fit(KINDS[kind](), loop), fit(KINDS[kind]()))


@every
def test_a_backward_pass_that_raised_and_is_made_again_from_the_same_forward_is_the_step(kind: str) -> None:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        handle = model[0].weight.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        handle.remove()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    same(fit(KINDS[kind](), loop), fit(KINDS[kind]()))


@every
def test_losses_that_nobody_differentiates_count_for_nothing(kind: str) -> None:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        kept = [criterion(model(x + k), y) for k in range(2)]
        plain(model, criterion, optimizer, x, y)
        assert len(kept) == 2

    same(fit(KINDS[kind](), loop), fit(KINDS[kind]()))


@every
@pytest.mark.parametrize("no_grad", [True, False], ids=["no_grad", "with_grad"])
@pytest.mark.parametrize("between", [True, False], ids=["before_backward", "after_step"])
def test_evaluation_counts_for_nothing(kind: str, no_grad: bool, between: bool) -> None:
    def evaluate(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
        model.eval()
        with torch.set_grad_enabled(not no_grad):
            criterion(model(x + 1), y)
        model.train()

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        if between:
            evaluate(model, criterion, x, y)
        loss.backward()
        optimizer.step()
        evaluate(model, criterion, x, y)

    same(fit(KINDS[kind](), loop), fit(KINDS[kind]()))
