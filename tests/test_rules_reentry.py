"""Rule 4 claims, of passes inside and beside the user's own backward pass:

- two preconditioners may share a model, an optimizer, and a layer's hooks; without the guard one would see the passes of the other;
- a user's `autograd.grad(loss, x)`, or of the output, leaves nothing behind, before or after `backward`;
- a gradient penalty takes the curvature of the criterion and the gradient of the whole loss; the self-check says that they differ;
- a user's tensor hooks and parameter hooks do not disturb us, and ours never touch the gradient: p.grad is the raw one until the step,
  accumulated once, and no gradient of a weight is formed in a nested pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
from precond import ObservationError
from precond.observe import catch, guard, observer, recorder
from training import (
    EXACT,
    KINDS,
    LR,
    batches,
    differ,
    fit,
    fit_dense,
    gradient,
    gradients,
    make,
    matrix_of,
    move,
    net,
    of,
    plain,
    same,
    sgd,
    solve,
)

CE = nn.CrossEntropyLoss()
every = pytest.mark.parametrize("kind", KINDS)


def shared(first: Any, second: Any, steps: int = 3) -> nn.Module:
    """Train with two preconditioners, the first on layer "0", the second on layer "2"."""
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    first.attach(model, criterion, optimizer)
    second.attach(model, criterion, optimizer)
    for x, y in batches(steps):
        plain(model, criterion, optimizer, x, y)
    return model


def pair(first: str = "fisher_mc", second: str = "empirical_fisher", **options: Any) -> tuple[Any, Any]:
    return make(first, "layer", overrides={"2": None}, **options), make(second, "layer", overrides={"0": None}, **options)


def test_two_preconditioners_share_a_model_and_an_optimizer() -> None:
    model = net()
    for x, y in batches():
        g, step = gradient(model, x, y), torch.zeros(43, dtype=torch.float64)
        for matrix, block in (("ggn", slice(0, 25)), ("empirical_fisher", slice(25, 43))):
            C = of(matrix)(model, x, y)[block, block]
            step[block] = solve(C, 0.1, g[block])
        move(model, -LR * step)
    same(shared(*pair("ggn")), model)


def test_without_the_guard_one_would_see_the_passes_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = shared(*reversed(pair()), steps=1)  # the empirical Fisher's tensor hooks are on when the other's pass comes by
    for module in (catch, guard, observer, recorder):
        monkeypatch.setattr(module, "busy", lambda: False)
    with pytest.raises(ObservationError, match=r"gradient of '2\.weight'"):
        shared(*reversed(pair()), steps=1)
    differ(shared(*reversed(pair(self_check=False)), steps=1), expected)


@every
def test_a_second_preconditioner_that_only_watches_changes_nothing(kind: str) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer, watching = sgd(model), make("empirical_fisher")
    watching.attach(model, criterion)
    KINDS[kind]().attach(model, criterion, optimizer)
    for x, y in batches():
        plain(model, criterion, optimizer, x, y)
    same(model, fit(KINDS[kind]()))


def saliency(of_loss: bool, after: bool) -> Any:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        x = x.clone().requires_grad_()
        f = model(x)
        loss = criterion(f, y)

        def look() -> None:
            torch.autograd.grad(loss if of_loss else f.sum(), x, retain_graph=True)

        if not after:
            look()
        loss.backward(retain_graph=after)
        if after:
            look()
        optimizer.step()

    return loop


@every
@pytest.mark.parametrize("of_loss", [True, False], ids=["of_loss", "of_output"])
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_the_users_own_autograd_grad_leaves_nothing(kind: str, of_loss: bool, after: bool) -> None:
    same(fit(KINDS[kind](), saliency(of_loss, after)), fit(KINDS[kind]()))


def test_a_part_of_the_users_own_autograd_grad_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    preconditioner = make(loss_weights="given").attach(net(), nn.CrossEntropyLoss())
    x, y = batches(1)[0]
    loss = preconditioner._session.criteria[0][0](preconditioner._session.model(x.requires_grad_()), y)
    torch.autograd.grad(loss, x, retain_graph=True)
    assert preconditioner._session.observer.parts == []
    loss.backward()
    assert len(preconditioner._session.observer.parts) == 1


def penalised(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = criterion(model(x), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 0.1 * slope.square().sum()


def with_penalty(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    penalised(model, criterion, x, y).backward()
    optimizer.step()


@pytest.mark.parametrize("cell", [("ggn", "full", "cholesky"), ("ggn", "matrix_free", "cg")], ids="-".join)
def test_a_gradient_penalty_takes_the_curvature_of_the_criterion(cell: tuple[str, str, str]) -> None:
    def slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(penalised(model, CE, x, y), list(model.parameters()))])

    same(fit(make(*cell, self_check=False), with_penalty), fit_dense(of("ggn"), slope=slope))


def test_a_gradient_penalty_does_not_pass_the_self_check() -> None:
    with pytest.raises(ObservationError, match=r"gradient of '0\.weight'.*loss that no attached criterion computes.*self_check=False"):
        fit(make(), with_penalty)


@every
def test_a_users_hook_on_an_activation_does_not_disturb_us(kind: str) -> None:
    fired: list[int] = []

    def build() -> nn.Module:
        model = net()
        model[0].register_forward_hook(lambda module, args, output: (output.register_hook(lambda g: fired.append(g.dim())), None)[1])
        return model

    same(fit(KINDS[kind](), build=build), fit(KINDS[kind]()))
    assert fired


@pytest.mark.parametrize("matrix", ["ggn", "fisher_mc", "empirical_fisher", "hessian"])
def test_p_grad_is_the_raw_gradient_and_accumulated_once(matrix: str) -> None:
    model, criterion, fired = net(), nn.CrossEntropyLoss(), []
    make(matrix, "full", "lu").attach(model, criterion, sgd(model))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: fired.append(p))
        p.register_hook(lambda g: fired.append(g))
    x, y = batches(1)[0]
    criterion(model(x), y).backward()
    assert torch.equal(gradients(model), torch.cat([g.flatten() for g in torch.autograd.grad(CE(net_like(model)(x), y), like.parameters())]))
    assert len(fired) == 8  # once a parameter and kind of hook: a nested pass forms no gradient of a weight
    assert_close(gradients(model), dense.gradient(model, CE, x, y), **EXACT)


like = net()


def net_like(model: nn.Module) -> nn.Module:
    like.load_state_dict(model.state_dict())
    return like


def test_the_matrix_is_read_after_a_step() -> None:
    preconditioner, (x, y) = make(), batches(1)[0]
    fit(preconditioner, steps=1)
    assert_close(matrix_of(preconditioner), of("ggn")(net(), x, y), **EXACT)
