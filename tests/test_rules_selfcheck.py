"""Rule 9 claims, of the first gradient that is observed:

- a weight used outside its layer's forward, beside it or instead of it, and a loss that no criterion saw are found, and one sentence names
  the parameter, its block and the ways out; off with `self_check=False`, without the block with an override;
- a tied weight, a module called twice, packed attention, LSTM, BatchNorm with a bias before it, in-place activations, accumulation, a loss
  scaled by AMP, a float32 model, and bf16 autocast are no false alarm;
- `curvature` looks too, at its first batch; what runs the pass again needs no layer and is right;
- it looks once: a later step costs nothing and is not checked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
import precond
from nets import CASES, Case, normal, seeded
from precond import ObservationError
from precond.observe.selfcheck import SelfCheck
from training import accumulate, batches, fit, make, net, plain, sgd


class Functional(nn.Module):
    """The weight of `inner` is used outside its forward: beside it, or instead of it."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside = beside
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x)) if self.beside else x
        return self.head(torch.tanh(F.linear(h, self.inner.weight)))


CELLS = pytest.mark.parametrize("cell", [("ggn", "kron_io"), ("empirical_fisher", "layer"), ("fisher_mc", "full")], ids="-".join)


@CELLS
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "instead"])
def test_functional_use_of_a_weight_is_found(cell: tuple[str, str], beside: bool) -> None:
    with pytest.raises(ObservationError, match=r"gradient of 'inner\.weight' is not what.*used outside the layer's forward.*overrides="):
        fit(make(*cell), build=lambda: seeded(lambda: Functional(beside)))


@CELLS
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "instead"])
def test_curvature_finds_a_functional_use(cell: tuple[str, str], beside: bool) -> None:
    model, data = seeded(lambda: Functional(beside)), (nn.CrossEntropyLoss(), *batches(1)[0])
    before = [p.grad for p in model.parameters()]
    with pytest.raises(ObservationError, match=r"gradient of 'inner\.weight' is not what.*used outside the layer's forward.*self_check=False"):
        precond.curvature(model, *data, matrix=cell[0], repr=cell[1])
    assert [p.grad for p in model.parameters()] == before
    assert precond.curvature(model, *data, matrix=cell[0], repr=cell[1], self_check=False).to_dense().isfinite().all()


def test_products_see_every_use_and_columns_do_not() -> None:
    model, data = seeded(lambda: Functional(True)), (nn.CrossEntropyLoss(), *batches(1)[0])
    M = dense.ggn(model, *data)
    assert (precond.curvature(model, *data, matrix="ggn", repr="matrix_free").to_dense() - M).abs().max() < 1e-10
    assert (precond.curvature(model, *data, matrix="ggn", repr="full", self_check=False).to_dense() - M).abs().max() > 1e-4


def test_functional_use_is_passed_over_when_it_is_meant_or_the_block_is_left_out() -> None:
    build = lambda: seeded(lambda: Functional(True))  # noqa: E731
    fit(make(repr="kron_io", self_check=False), build=build)
    fit(make(repr="kron_io", overrides={"inner": None}), build=build)


def with_decay(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    (criterion(model(x), y) + 0.1 * model[0].weight.square().sum()).backward()
    optimizer.step()


@CELLS
def test_a_loss_that_no_criterion_saw_is_found(cell: tuple[str, str]) -> None:
    with pytest.raises(ObservationError, match=r"'0\.weight'.*part of a loss that no attached criterion computes.*attach every criterion"):
        fit(make(*cell), with_decay)


def test_a_missed_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a missed tie would look like: one of two calls of the layer is not recorded."""
    from precond.observe.observer import Observer

    calls, record = [], Observer._after_layer

    def forgetful(self: Any, name: str, *rest: Any) -> None:
        calls.append(name)
        if calls.count("layer") != 2 or name != "layer":
            record(self, name, *rest)

    monkeypatch.setattr(Observer, "_after_layer", forgetful)
    with pytest.raises(ObservationError, match=r"gradient of 'layer\.weight'"):
        observe(CASES["reused"], "kron_io")


def observe(case: Case, repr: str, dtype: torch.dtype = torch.float64, matrix: str = "ggn") -> Any:
    model, criterion = case.make().to(dtype), type(case.criterion)()
    preconditioner, optimizer = make(matrix, repr, damping=1.0), sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    inputs, targets = (t.to(dtype) if t.is_floating_point() else t for t in (case.inputs, case.targets))
    plain(model, criterion, optimizer, inputs, targets)
    assert preconditioner._session.observer.selfcheck.pending is False
    return preconditioner


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("repr", ["kron_io", "full"])
@pytest.mark.parametrize("case", ["mlp", "conv", "transformer", "transformer_flat", "transformer_ignore", "mse", "bce", "mha", "lstm", "reused", "bn_train"])
def test_no_false_alarm(case: str, repr: str, dtype: torch.dtype) -> None:
    observe(CASES[case], repr, dtype)


def test_no_false_alarm_with_accumulation_and_amp() -> None:
    fit(make(), accumulate(2, 4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        scaler.scale(criterion(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()

    fit(make(), loop)


def wide(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    inner = [nn.BatchNorm2d(16)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *inner, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("matrix", ["empirical_fisher", "fisher_mc"])
@pytest.mark.parametrize("norm", [True, False], ids=["batch_norm", "no_norm"])
@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_no_false_alarm_in_low_precision(matrix: str, norm: bool, autocast: bool, backward_inside: bool) -> None:
    model, criterion = wide(norm), nn.CrossEntropyLoss()
    preconditioner = make(matrix, "kron_io", damping=1.0).attach(model, criterion)
    x, y = 3 * normal(32, 3, 8, 8).float() + 1, torch.arange(32) % 10
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = criterion(model(x), y)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    preconditioner.step()


def test_low_precision_still_finds_functional_use() -> None:
    model, criterion = seeded(lambda: Functional(True)).float(), nn.CrossEntropyLoss()
    make(repr="kron_io").attach(model, criterion)
    x, y = batches(1, size=32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(x.float()), y)
    with pytest.raises(ObservationError, match=r"inner\.weight"):
        loss.backward()


def test_it_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    end = SelfCheck.end
    monkeypatch.setattr(SelfCheck, "end", lambda self, *args: (looked.append(1), end(self, *args))[1])
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    make().attach(model, criterion, optimizer)
    first, second = batches(2)
    plain(model, criterion, optimizer, *first)
    with_decay(model, criterion, optimizer, *second)
    assert looked == [1]
