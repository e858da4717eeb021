"""Claims about `state_dict`:

- it holds tensors, numbers and strings only, in plain containers, and loads with `weights_only=True`;
- training saved after some steps and continued in a fresh process is the uninterrupted training, bit for bit: sampled labels, roots that are
  refreshed rarely, moments, warm starts, transforms and counters included;
- it may be loaded before or after `attach`, and is a snapshot: neither the run it came from nor the one that loaded it changes it;
- a state of another model, triple or list of transforms is refused with one sentence, and changes nothing.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond import Preconditioner, UsageError
from training import KINDS, batches, fit, make, net, plain, sgd, theta

RUNS: dict[str, Any] = {
    "kfac": lambda seed: precond.recipe("kfac", seed=seed),
    "shampoo": lambda seed: precond.recipe("shampoo", seed=seed, solver_interval=3),
    "adam": lambda seed: precond.recipe("adam", seed=seed),
    "hessian_free": lambda seed: precond.recipe("hessian_free", seed=seed),
    "ekfac": lambda seed: precond.recipe("ekfac", seed=seed, history=0.9, repr=precond.representations.KronEigen(basis_interval=3)),
    "soap": lambda seed: precond.recipe("soap", seed=seed),
    "graft": lambda seed: precond.recipe("kfac", seed=seed, transforms=[precond.transforms.Graft("adam"), precond.transforms.Momentum(0.9)]),
    "window": lambda seed: make("fisher_mc", "layer", seed=seed, history=precond.history.Window(3), curvature_interval=2, solver_interval=4),
}
every = pytest.mark.parametrize("name", RUNS)
CHILD = """
import sys, torch
torch.set_num_threads(1)
from test_state import RUNS, attached, plain, batches, theta
name, before, after = sys.argv[1:]
preconditioner, model, criterion, optimizer = attached(name, seed=999)
saved = torch.load(before, weights_only=True)
model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"]); preconditioner.load_state_dict(saved["preconditioner"])
for x, y in batches(9)[4:]:
    plain(model, criterion, optimizer, x, y)
torch.save((theta(model), preconditioner.state_dict()), after)
"""


def attached(name: str, seed: int = 0) -> tuple[Preconditioner, nn.Module, nn.Module, torch.optim.Optimizer]:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return RUNS[name](seed).attach(model, criterion, optimizer), model, criterion, optimizer


def leaves(tree: Any) -> Iterator[Any]:
    if type(tree) in (dict, list, tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)
    else:
        yield tree


def equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def run(name: str, steps: int) -> Any:
    made = attached(name)
    for x, y in batches(steps):
        plain(*made[1:], x, y)
    return made


@every
def test_a_fresh_process_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    preconditioner, model, _, optimizer = run(name, 4)
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "preconditioner": preconditioner.state_dict()}
    torch.save(whole, tmp_path / "before.pt")
    command = [sys.executable, "-c", CHILD, name, str(tmp_path / "before.pt"), str(tmp_path / "after.pt")]
    path = ":".join(str(Path(__file__).parents[1] / folder) for folder in ("src", "tests"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    resumed, state = torch.load(tmp_path / "after.pt", weights_only=True)
    preconditioner, model, _, _ = run(name, 9)
    assert torch.equal(resumed, theta(model))
    assert equal(state, preconditioner.state_dict())


@every
def test_it_holds_tensors_and_numbers_only(name: str) -> None:
    preconditioner, *_ = run(name, 3)
    state = preconditioner.state_dict()
    found = list(leaves(state))
    assert {type(leaf) for leaf in found} <= {Tensor, int, float, bool, str, type(None)}
    assert all(not leaf.requires_grad and leaf.grad_fn is None for leaf in found if isinstance(leaf, Tensor))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=True), state)


def test_every_kind_is_saved_as_tensors_and_numbers() -> None:
    for kind in KINDS:
        preconditioner = KINDS[kind]()
        fit(preconditioner, steps=2)
        assert {type(leaf) for leaf in leaves(preconditioner.state_dict())} <= {Tensor, int, float, bool, str, type(None)}, kind


@every
def test_loading_before_or_after_attach_is_the_same(name: str) -> None:
    saved = run(name, 4)
    state, after = saved[0].state_dict(), []
    for early in (True, False):
        model, criterion, preconditioner = net(), nn.CrossEntropyLoss(), RUNS[name](5)
        model.load_state_dict(saved[1].state_dict())
        optimizer = sgd(model)
        if early:
            preconditioner.load_state_dict(state)
        preconditioner.attach(model, criterion, optimizer)
        if not early:
            preconditioner.load_state_dict(state)
        plain(model, criterion, optimizer, *batches(5)[4])
        after.append(theta(model))
    assert torch.equal(*after)


@every
def test_it_is_a_snapshot(name: str) -> None:
    made = run(name, 3)
    state = made[0].state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    copy = torch.load(file, weights_only=True)
    other = attached(name)
    other[0].load_state_dict(state)
    for x, y in batches(3):
        plain(*made[1:], x, y)
        plain(*other[1:], x, y)
    assert equal(state, copy)


def test_another_model_is_refused_and_changes_nothing() -> None:
    state = run("kfac", 2)[0].state_dict()
    other, criterion = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    preconditioner = RUNS["kfac"](3).attach(other, criterion)
    before = preconditioner.state_dict()
    with pytest.raises(UsageError, match=r"^the saved state belongs to another model or triple.*differ in the blocks 4\.$"):
        preconditioner.load_state_dict(state)
    assert equal(preconditioner.state_dict(), before)


def test_another_triple_is_refused() -> None:
    preconditioner, *_ = attached("kfac")
    with pytest.raises(UsageError, match=r"another model or triple"):
        preconditioner.load_state_dict(run("shampoo", 2)[0].state_dict())


def test_the_same_blocks_of_another_shape_or_cell_are_refused() -> None:
    state = run("kfac", 2)[0].state_dict()
    wider, criterion = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), nn.CrossEntropyLoss()
    with pytest.raises(UsageError, match=r"block '0'"):
        RUNS["kfac"](0).attach(wider, criterion).load_state_dict(state)
    with pytest.raises(UsageError, match=r"block '0'"):
        make(repr="layer").attach(net(), criterion).load_state_dict(state)


def test_another_list_of_transforms_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^the saved state has 1 transforms, this preconditioner 0\.$"):
        precond.recipe("kfac", transforms=[]).attach(net(), nn.CrossEntropyLoss()).load_state_dict(run("kfac", 1)[0].state_dict())


def test_something_that_is_no_state_is_refused() -> None:
    with pytest.raises(UsageError, match="state_dict"):
        attached("kfac")[0].load_state_dict({"model": {}})
