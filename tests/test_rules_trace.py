"""Rule 11 claims:

- a pickled model, criterion and optimizer load and run where `precond` cannot be imported; a deep copy and an `AveragedModel` are models of
  their own, which nothing watches; between steps no layer has a hook;
- no graph is kept alive, of differentiated losses and of others, with the garbage collector off, whatever the kind of observation;
- `remove()` and the context manager leave no hook on the model, the criterion, the optimizer or a parameter, and the loop goes on plainly;
- dropping the last reference to a preconditioner, and of an optimizer, ends it.
"""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training import KINDS, batches, fit, make, net, plain, same, sgd, theta

every = pytest.mark.parametrize("kind", KINDS)
CHILD = """
import sys, torch
sys.modules["precond"] = None  # an import of it raises
model, criterion, optimizer = torch.load(sys.argv[1], weights_only=False)
x, y = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion(model(x), y).backward()
optimizer.step()
print("ran")
"""


def trained(kind: str) -> tuple[Any, nn.Module, nn.Module, torch.optim.Optimizer]:
    preconditioner, model, criterion = KINDS[kind](), net(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    plain(model, criterion, optimizer, *batches(1)[0])
    return preconditioner, model, criterion, optimizer


@pytest.mark.parametrize("kind", ["kfac", "ef_kron", "hessian_free"])
def test_a_pickled_model_does_not_need_the_library(kind: str, tmp_path: Path) -> None:
    _, model, criterion, optimizer = trained(kind)
    torch.save((model, criterion, optimizer), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ran"]


@every
def test_a_copy_is_nobodys_model(kind: str) -> None:
    preconditioner, model, criterion, optimizer = trained(kind)
    x, y = batches(1)[0]
    for other in (copy.deepcopy(model), AveragedModel(model)):
        copy.deepcopy(criterion)(other(x), y).backward()
        criterion(other(x), y).backward()
        assert preconditioner._session.observer.parts == []
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in other.modules()) <= 4  # inert
    plain(model, criterion, optimizer, *batches(2)[1])
    same(model, fit(KINDS[kind](), steps=2))


def test_an_averaged_model_follows() -> None:
    _, model, criterion, optimizer = trained("kfac")
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    first = theta(model).clone()
    plain(model, criterion, optimizer, *batches(2)[1])
    averaged.update_parameters(model)
    torch.testing.assert_close(theta(averaged.module), (first + theta(model)) / 2)


@every
def test_between_steps_no_layer_has_a_hook(kind: str) -> None:
    _, model, _, _ = trained(kind)
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in model)


@every
def test_a_model_can_be_pickled_inside_a_step(kind: str) -> None:
    preconditioner, model, criterion = KINDS[kind](), net(), nn.CrossEntropyLoss()
    preconditioner.attach(model, criterion, sgd(model))
    criterion(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    file = io.BytesIO()
    torch.save(model, file)
    assert b"precond" not in file.getvalue()


class Sentinel:
    """A hook that lives as long as the graph it is hung on."""

    def __call__(self, gradient: Tensor) -> None:
        return None


@every
@pytest.mark.parametrize("closing", [True, False], ids=["step", "no_step"])
def test_no_graph_is_kept_alive_without_the_garbage_collector(kind: str, closing: bool) -> None:
    preconditioner, model, criterion = KINDS[kind](), net(), nn.CrossEntropyLoss()
    optimizer = sgd(model, lr=1e-3)
    preconditioner.attach(model, criterion, optimizer)
    alive: list[weakref.ref[Sentinel]] = []
    tensors: list[int] = []
    data = batches(30)
    gc.collect()
    gc.disable()
    try:
        for k, (x, y) in enumerate(data):
            f = model(x)
            sentinel = Sentinel()
            alive.append(weakref.ref(sentinel))
            f.register_hook(sentinel)
            del sentinel
            loss = criterion(f, y)
            if k % 3 == 0:
                optimizer.zero_grad()
                loss.backward()
                if closing:
                    optimizer.step()
            del f, loss
            if k in (6, 29):
                tensors.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert sum(ref() is not None for ref in alive) <= (0 if closing else 1)  # the one that waits for its step
    assert tensors[1] <= tensors[0] + 3


def hooks(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    modules = [*model.modules(), criterion]
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    count += len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return count + sum(len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


@every
@pytest.mark.parametrize("when", ["at_once", "after_forward", "after_backward", "after_step"])
def test_remove_leaves_no_hook(kind: str, when: str) -> None:
    preconditioner, model, criterion = KINDS[kind](), net(), nn.CrossEntropyLoss()
    optimizer, (x, y) = sgd(model), batches(1)[0]
    preconditioner.attach(model, criterion, optimizer)
    assert hooks(model, criterion, optimizer) > 0
    if when == "after_step":
        plain(model, criterion, optimizer, x, y)
        start = theta(model).clone()
    if when in ("after_forward", "after_backward"):
        loss = criterion(model(x), y)
        if when == "after_backward":
            loss.backward()
    preconditioner.remove()
    assert hooks(model, criterion, optimizer) == 0
    if when in ("at_once", "after_forward"):
        plain(model, criterion, optimizer, x, y)
        same(model, fit(None, steps=1))
    if when == "after_step":
        assert torch.equal(start, theta(model))
        assert kind == "hessian_free" or preconditioner.operators  # the statistics stay readable


def test_the_context_manager_removes_and_attaching_again_works() -> None:
    model, criterion, preconditioner = net(), nn.CrossEntropyLoss(), make(history=0.9)
    optimizer, data = sgd(model), batches(4)
    for half in (data[:2], data[2:]):
        with preconditioner.attach(model, criterion, optimizer) as entered:
            assert entered is preconditioner
            for x, y in half:
                plain(model, criterion, optimizer, x, y)
        assert hooks(model, criterion, optimizer) == 0
    same(model, fit(make(history=0.9), steps=4))


def test_the_last_reference_ends_it() -> None:
    preconditioner, model, criterion, optimizer = trained("kfac")
    gone = weakref.ref(preconditioner)
    del preconditioner
    assert gone() is not None  # the optimizer keeps it: `precond.recipe("kfac").attach(...)` needs no name
    del optimizer
    gc.collect()
    assert gone() is None
    plain(model, criterion, sgd(model), *batches(1)[0])
