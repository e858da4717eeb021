"""Rules 5 and 6 claim:

- `optimizer.step(closure)` and `step(closure=closure)` take the same steps as the plain loop and return the loss; the work is done inside
  the closure, since what the hook sees before it are the gradients of the step before;
- an optimizer that evaluates its closure several times a step (LBFGS) is refused with a sentence;
- fused SGD and Adam under GradScaler, whose hooks see scaled gradients, take the same steps as without AMP, clipped or not; a step with
  an inf changes no parameter, no statistic, no state of the optimizer and no step counter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from precond import Preconditioner, UsageError
from precond.optimizer_hooks import OptimizerHooks
from training import EXACT, KINDS, batches, differ, fit, make, net, same, sgd, theta

every = pytest.mark.parametrize("kind", KINDS)


def closing(keyword: bool) -> Any:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        losses = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            losses.append(loss)
            return loss

        with torch.no_grad():
            got = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert got is losses[0] and len(losses) == 1

    return loop


@every
@pytest.mark.parametrize("keyword", [True, False], ids=["keyword", "positional"])
def test_a_closure_takes_the_plain_steps(kind: str, keyword: bool) -> None:
    preconditioner = KINDS[kind]()
    same(fit(preconditioner, closing(keyword)), fit(KINDS[kind]()))
    assert preconditioner.diagnostics["steps"] == 3


def test_a_closure_that_is_not_wrapped_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit(make())
    monkeypatch.setattr(OptimizerHooks, "_wrap", lambda self, optimizer, closure: closure)
    differ(fit(make(), closing(False)), expected)


def test_a_closure_that_forgets_backward_leaves_nothing_to_do() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer, (x, y) = sgd(model), batches(1)[0]
    preconditioner = make().attach(model, criterion, optimizer)
    optimizer.step(lambda: criterion(model(x), y))
    same(model, net())
    assert preconditioner.diagnostics["steps"] == 0


def test_an_optimizer_that_evaluates_several_times_is_refused() -> None:
    with pytest.raises(UsageError, match=r"LBFGS evaluates its closure several times a step.*such as torch\.optim\.SGD"):
        fit(make(), closing(False), optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4))


def test_an_lbfgs_that_evaluates_once_is_one_gradient_a_step() -> None:
    preconditioner = make()
    fit(preconditioner, closing(False), optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=1))
    assert preconditioner.diagnostics["steps"] == 3


FUSED: dict[str, Callable[[nn.Module, bool], torch.optim.Optimizer]] = {
    "sgd": lambda m, fused: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=fused),
    "adam": lambda m, fused: torch.optim.Adam(m.parameters(), lr=0.1, fused=fused),
    "adamw": lambda m, fused: torch.optim.AdamW(m.parameters(), lr=0.1, fused=fused),
}
every_fused = pytest.mark.parametrize("outer", FUSED)


def amp(clip: float | None = None, before: Callable[..., None] | None = None) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        if before is not None:
            before(scaler, model, criterion, optimizer, x, y)
        optimizer.zero_grad()
        scaler.scale(criterion(model(x), y)).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()

    return loop


def clipped(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def unfused(kind: str, outer: str, *loop: Any) -> nn.Module:
    return fit(KINDS[kind](), *loop, optimizer=lambda m: FUSED[outer](m, False))


@every
@every_fused
def test_a_fused_optimizer_under_amp_takes_the_plain_steps(kind: str, outer: str) -> None:
    ours = fit(KINDS[kind](), amp(), optimizer=lambda m: FUSED[outer](m, True))
    assert_close(theta(ours), theta(unfused(kind, outer)), rtol=1e-9, atol=1e-9)


@every
def test_a_fused_optimizer_under_amp_with_clipping_takes_the_plain_steps(kind: str) -> None:
    ours = fit(KINDS[kind](), amp(clip=0.1), optimizer=lambda m: FUSED["sgd"](m, True))
    assert_close(theta(ours), theta(unfused(kind, "sgd", clipped)), **EXACT)


def test_a_scaled_gradient_that_is_not_divided_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = Preconditioner.rewrite
    monkeypatch.setattr(Preconditioner, "rewrite", lambda self, scale: rewrite(self, None))
    differ(fit(KINDS["shampoo"](), amp(), optimizer=lambda m: FUSED["sgd"](m, True)), unfused("shampoo", "sgd"))


@every
@every_fused
def test_a_step_with_an_inf_changes_nothing(kind: str, outer: str) -> None:
    preconditioner = KINDS[kind]()

    def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        state = preconditioner.state_dict()
        return copy.deepcopy((theta(model), {n: b["statistics"] for n, b in state["blocks"].items()}, state["step"], optimizer.state_dict()))

    def with_inf(scaler: Any, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        if not optimizer.state:
            return
        before = held(model, optimizer)
        optimizer.zero_grad()
        scaler.scale(criterion(model(x + 1), y) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_close(held(model, optimizer), before, rtol=0, atol=0)

    ours = fit(preconditioner, amp(before=with_inf), optimizer=lambda m: FUSED[outer](m, True))
    assert_close(theta(ours), theta(unfused(kind, outer)), rtol=1e-9, atol=1e-9)
