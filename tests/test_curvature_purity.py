"""Claims about what `precond.curvature` leaves behind (identity 32), for every valid cell.

- Pure: parameters and their versions, `.grad`, `requires_grad`, hooks of every module and of the criterion, training modes, buffers, the
  inputs, and torch's, numpy's and Python's generators are as before, also after an error, under `no_grad`, and beside an attached
  preconditioner, whose next step is what it would have been. No tensor stays alive.
- A frozen parameter has no place in the matrix. One example, and a batch that is not contiguous, are as good as any.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import precond
from nets import CASES, Case, normal
from pairs import LEFT, OF_A_BATCH, PAIRS, SAMPLED, entries, exactly, hosts

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

pytestmark = pytest.mark.filterwarnings(LEFT)
every_cell = pytest.mark.parametrize(("matrix", "repr"), PAIRS)


def snapshot(model: nn.Module, criterion: nn.Module, *data: Tensor) -> dict[str, Any]:
    """All that must not change, by value; hooks by identity."""
    seen: dict[str, Any] = {"rng": torch.get_rng_state(), "python": random.getstate(), "numpy": str(numpy.random.get_state())}
    for i, x in enumerate(data):
        seen[f"data{i}"] = (x.clone(), x._version)
    for name, p in model.named_parameters():
        seen[name] = (p.detach().clone(), p._version, id(p), p.requires_grad, None if p.grad is None else (p.grad.clone(), id(p.grad)))
        seen[f"{name} hooks"] = dict(p._backward_hooks or {})
    for name, b in model.named_buffers():
        seen[f"buffer {name}"] = (b.clone(), id(b))
    for top, module in (("model", model), ("criterion", criterion)):
        for name, inner in module.named_modules():
            seen[f"{top} {name}"] = (inner.training, {k: list(v) for k, v in vars(inner).items() if "hooks" in k and isinstance(v, dict)})
            seen[f"{top} {name} fields"] = sorted(vars(inner))
    return seen


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    torch.testing.assert_close(
        {k: v for k, v in after.items() if isinstance(v, Tensor)},
        {k: v for k, v in before.items() if isinstance(v, Tensor)},
        rtol=0,
        atol=0,
    )
    for key, value in before.items():
        if isinstance(value, tuple):
            for old, new in zip(value, after[key], strict=True):
                assert _same(old, new), key
        elif not isinstance(value, Tensor):
            assert value == after[key], key


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor):
        return torch.equal(old, new)
    return len(old) == len(new) and all(map(_same, old, new)) if isinstance(old, tuple) and isinstance(new, tuple) else bool(old == new)


def prepared(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A network with one frozen parameter, a gradient on another, and hooks of the user's."""
    case = CASES[name]
    model = case.make()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    model.register_forward_hook(lambda *_: None)
    next(iter(model.children())).register_forward_pre_hook(lambda *_: None)
    return model, case.criterion, case.inputs.clone(), case.targets.clone()


def test_the_snapshot_sees_a_change() -> None:
    model, criterion, x, y = prepared("bn_train")
    before = snapshot(model, criterion, x, y)
    unchanged(before, snapshot(model, criterion, x, y))
    changes = [lambda: model(x), lambda: torch.rand(1), lambda: model.eval(), lambda: x.add_(1.0), lambda: model.zero_grad()]
    changes += [lambda: model[1].register_forward_hook(lambda *_: None), lambda: criterion(model(x), y).backward()]
    for change in changes:
        before = snapshot(model, criterion, x, y)
        change()
        with pytest.raises(AssertionError):
            unchanged(before, snapshot(model, criterion, x, y))


@pytest.mark.parametrize(
    ("name", "matrix", "repr"), [(name, m, r) for name in ("mlp", "bn_train", "transformer") for m, r in PAIRS if hosts(name, m)]
)
def test_curvature_changes_nothing(name: str, matrix: str, repr: str) -> None:
    model, criterion, x, y = prepared(name)
    before = snapshot(model, criterion, x, y)
    C = precond.curvature(model, criterion, x, y, matrix=matrix, repr=repr)
    product = C @ normal(C.shape[0])
    unchanged(before, snapshot(model, criterion, x, y))
    assert C.shape[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not (product if C.live else C.diagonal()).requires_grad


@every_cell
def test_an_error_changes_nothing_either(matrix: str, repr: str) -> None:
    model, criterion, x, y = prepared("bn_train")
    before = snapshot(model, criterion, x, y)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        precond.curvature(model, criterion, x, y[:-1], matrix=matrix, repr=repr)
    unchanged(before, snapshot(model, criterion, x, y))


@every_cell
def test_no_grad_makes_no_difference(matrix: str, repr: str) -> None:
    case = CASES["mlp"]
    want = entries(
        precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=3), matrix, repr
    )
    with torch.no_grad():
        got = entries(
            precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=3), matrix, repr
        )
        assert not torch.is_grad_enabled()
    close(got, want)


@pytest.fixture
def frozen() -> Iterator[None]:
    """What is there already is looked at no more, by the collector neither."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@every_cell
@pytest.mark.usefixtures("frozen")
def test_no_tensor_stays_alive(matrix: str, repr: str) -> None:
    case = CASES["mlp"]
    model = case.make()

    def alive() -> int:
        precond.curvature(model, case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr)
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    alive()
    assert alive() == alive()


@pytest.mark.parametrize("matrix", OF_A_BATCH)
def test_an_attached_preconditioner_does_not_notice(matrix: str) -> None:
    case, steps = CASES["mlp"], []
    for look in (False, True):
        model, criterion = case.make(), copy.deepcopy(case.criterion)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with precond.Preconditioner(matrix=matrix, repr="layer", solver="lu", damping=1.0, seed=5).attach(model, criterion, optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                loss = criterion(model(case.inputs), case.targets)
                if look:
                    precond.curvature(model, criterion, case.inputs, case.targets, matrix=matrix, repr="full")
                loss.backward()
                optimizer.step()
        steps.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *steps))


@pytest.mark.parametrize(("matrix", "repr"), [p for p in PAIRS if p[0] not in SAMPLED and not p[1].startswith("kron")])
@pytest.mark.parametrize("name", ["mlp", "mse"])
def test_one_example_and_a_batch_that_is_not_contiguous(name: str, matrix: str, repr: str) -> None:
    case = CASES[name]
    model, x = case.make(), case.inputs.T.contiguous().T
    chosen = exactly(matrix, repr, model)
    assert not x.is_contiguous()
    for inputs, y in ((x, case.targets), (x[:1], case.targets[:1]), (x[::2], case.targets[::2])):
        plain = Case(name, case.make, case.criterion, inputs.contiguous(), y)
        got = entries(precond.curvature(model, case.criterion, inputs, y, matrix=chosen, repr=repr), matrix, repr)
        close(got, entries(precond.curvature(model, case.criterion, inputs.contiguous(), y, matrix=chosen, repr=repr), matrix, repr))
        if repr == "full":
            close(got, dense_cells.MATRICES[matrix](model, plain.criterion, plain.inputs, y))


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "hessian"])
def test_a_convolution_of_a_channels_last_batch(matrix: str) -> None:
    case = CASES["conv"]
    x = case.inputs.to(memory_format=torch.channels_last)
    assert not x.is_contiguous()
    got = precond.curvature(case.make(), case.criterion, x, case.targets, matrix=matrix, repr="layer").to_dense()
    close(got, dense.project_layer(dense_cells.whole(case, matrix), case.make()))
