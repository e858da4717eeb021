"""Claims about the training loop, which does not change:

- the loop of the interface runs word for word, and K-FAC's step is the one computed densely from the factors;
- a frozen parameter, two parameter groups, clipping, and `attach` without an optimizer and `step()` give the same steps as the plain loop,
  or the dense ones; Adam's recipe is Adam;
- `step()` twice for one backward pass, before `attach` or without a gradient, and `attach` twice are refused with a sentence.

Several criteria and `observe()`: `test_loops_criteria.py`. Accumulation, scaled losses, abandoned steps, evaluation, closures, several
preconditioners, `remove()`: `test_rules_*.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import precond
from precond import UsageError
from training import EXACT, KINDS, LR, batches, fit, fit_dense, gradient, gradients, make, move, net, of, plain, same, sgd, theta

every = pytest.mark.parametrize("kind", KINDS)


def test_the_loop_of_the_interface_word_for_word() -> None:
    model, loader = net(), batches(12)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    preconditioner = precond.Preconditioner(                         # choose: a wrong choice fails here, before there is a model
        matrix="fisher_mc", repr="kron_io", solver="cholesky",
        damping=1e-3, history=0.95, solver_interval=10,
    )  # fmt: skip
    preconditioner.attach(model, criterion, optimizer)               # bind: hooks only, nothing of the model is changed  # fmt: skip

    for x, y in loader:                     # the loop below is the one the user already had  # fmt: skip
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()                    # p.grad holds the preconditioned gradient when the update is made  # fmt: skip

    assert dict(preconditioner.diagnostics) | {"steps": 12, "observations": 12, "refreshes": 4} == dict(preconditioner.diagnostics)
    assert bool(theta(model).isfinite().all())


def test_a_kfac_step_is_the_dense_one() -> None:
    """By hand: (B + sqrt(l) / pi I)^-1 G (A + pi sqrt(l) I)^-1 with the factors of the exact GGN."""
    model, preconditioner, (x, y) = net(), make(repr="kron_io", damping=0.01), batches(1)[0]
    fit(preconditioner, data=[(x, y)])
    with torch.no_grad():
        h = torch.tanh(model[0](x))
        p = model[2](h).softmax(1)
    S = torch.stack([p[:, c : c + 1].sqrt() * (torch.eye(3, dtype=p.dtype)[c] - p) for c in range(3)])  # columns of diag p - p p^T
    back = (S @ model[2].weight.detach()) * (1 - h.square())
    g, step = gradient(net(), x, y), []
    for name, a, s, G in (("0", x, back, (g[:20], g[20:25])), ("2", h, S, (g[25:40], g[40:]))):
        a = torch.cat([a, torch.ones(6, 1, dtype=a.dtype)], 1)
        A, B = a.T @ a / 6, torch.einsum("kni,knj->ij", s, s) / 6
        assert_close([f.to_dense() for f in preconditioner.operators[name].factors], [B, A], **EXACT)
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
        D = torch.linalg.solve(B + 0.1 / pi * torch.eye(len(B), dtype=B.dtype), torch.cat([G[0].view(len(B), -1), G[1][:, None]], 1))
        D = D @ torch.linalg.inv(A + pi * 0.1 * torch.eye(len(A), dtype=A.dtype))
        step += [D[:, :-1].flatten(), D[:, -1]]
    ours, expected = fit(make(repr="kron_io", damping=0.01), data=[(x, y)]), net()
    move(expected, -LR * torch.cat(step))
    same(ours, expected)


def test_adam_is_adam() -> None:
    ours = fit(precond.recipe("adam"), steps=6)
    theirs = fit(None, optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=LR), steps=6)
    assert_close(theta(ours), theta(theirs), rtol=1e-9, atol=1e-9)


def frozen_net(*names: str) -> nn.Module:
    model = net()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)
    return model


@pytest.mark.parametrize("frozen", [("0.weight", "0.bias"), ("0.weight",), ("2.bias",)], ids=str)
@pytest.mark.parametrize("kind", ["ggn_full", "hessian_free"])
def test_a_frozen_parameter_stays_and_the_others_take_the_dense_step(kind: str, frozen: tuple[str, ...]) -> None:
    build = lambda: frozen_net(*frozen)  # noqa: E731
    ours = fit(KINDS[kind](), build=build)
    same(ours, fit_dense(of("ggn"), build=build))
    assert all(torch.equal(ours.get_parameter(n), net().get_parameter(n)) for n in frozen)


@every
def test_two_parameter_groups_keep_their_learning_rates(kind: str) -> None:
    def groups(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": model[2].parameters(), "lr": 0.02}, {"params": model[0].parameters()}], lr=LR)

    one, two = fit(KINDS[kind](), steps=1), fit(KINDS[kind](), steps=1, optimizer=groups)
    start = net()
    for layer, factor in ((0, 1.0), (2, 0.02 / LR)):
        for a, b, p in zip(one[layer].parameters(), two[layer].parameters(), start[layer].parameters(), strict=True):
            assert_close(b - p, factor * (a - p), **EXACT)


def test_an_optimizer_of_some_parameters_only() -> None:
    ours = fit(make(repr="layer"), optimizer=lambda m: torch.optim.SGD(m[2].parameters(), lr=LR), steps=1)
    both = fit(make(repr="layer"), steps=1)
    assert torch.equal(ours[0].weight, net()[0].weight)
    assert_close(ours[2].weight, both[2].weight, **EXACT)


def test_clipping_before_the_step_is_of_the_raw_gradient() -> None:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    def clipped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        g = gradient(model, x, y)
        return g * (0.1 / (g.norm() + 1e-6)).clamp(max=1.0)

    same(fit(make(), loop), fit_dense(of("ggn"), slope=clipped))


@every
def test_attach_without_an_optimizer_and_step(kind: str) -> None:
    model, criterion, preconditioner = net(), nn.CrossEntropyLoss(), KINDS[kind]()
    optimizer = sgd(model)
    preconditioner.attach(model, criterion)
    for x, y in batches():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        preconditioner.step()
        optimizer.step()
    same(model, fit(KINDS[kind]()))


@pytest.mark.parametrize("call", [lambda p: p.step(), lambda p: p.describe(), lambda p: p.observe(torch.ones(()), torch.ones(1), torch.ones(1))])
def test_a_call_before_attach_is_refused(call: Any) -> None:
    with pytest.raises(UsageError, match=r"not attached: call attach\(model, criterion, optimizer\) first"):
        call(make())


@every
def test_step_twice_for_one_backward_pass_is_refused(kind: str) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    preconditioner, (x, y) = KINDS[kind]().attach(model, criterion), batches(1)[0]
    criterion(model(x), y).backward()
    preconditioner.step()
    written = gradients(model)
    with pytest.raises(UsageError, match="called twice for one backward pass"):
        preconditioner.step()
    assert torch.equal(gradients(model), written)
    criterion(model(x), y).backward()  # a new backward pass, accumulated on top or not
    preconditioner.step()


def test_step_without_a_gradient_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no parameter has a gradient: call loss\.backward\(\)"):
        make().attach(net(), nn.CrossEntropyLoss()).step()


def test_attach_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"attached already: call remove\(\) first"):
        make().attach(net(), nn.CrossEntropyLoss()).attach(net(), nn.CrossEntropyLoss())


def test_an_optimizer_step_without_a_gradient_is_no_step() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    preconditioner = make().attach(model, criterion, optimizer)
    optimizer.step()
    plain(model, criterion, optimizer, *batches(1)[0])
    assert preconditioner.diagnostics["steps"] == 1
    same(model, fit(make(), steps=1))
