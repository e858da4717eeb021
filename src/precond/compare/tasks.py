"""The tasks a comparison can train on: real data and a model, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from precond.compare.extras import need
from precond.errors import UnknownName
from precond.registry import closest

DATA_SEED = 0
"""Seeds the split into training and test data, which is the same in every run."""
TEST_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification problem and the model trained on it.

    Attributes:
        name: what `--task` calls it.
        summary: one line for the report.
        make_model: seed -> an initialised model; leaves torch's global generator as it was.
        make_criterion: a fresh loss module, one per run because methods put hooks on it.
        train_inputs, train_targets, test_inputs, test_targets: the data, one example per row.
    """

    name: str
    summary: str
    make_model: Callable[[int], nn.Module]
    make_criterion: Callable[[], nn.Module]
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def names() -> list[str]:
    """The tasks there are."""
    return list(_TASKS)


def get(name: str) -> Task:
    """The task of that name, its data loaded; raises `UnknownName`, or says which package is missing."""
    if name not in _TASKS:
        raise UnknownName(f"{name!r} is not one of the tasks{closest(name, _TASKS)}")
    return _TASKS[name]()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def _digits_mlp() -> Task:
    return _digits("digits_mlp", "a fully connected network, 64-128-64-10 with ReLU", _mlp, (64,))


def _digits_conv() -> Task:
    return _digits("digits_conv", "two 3x3 convolutions (16 and 32 channels, ReLU, max pooling) and a linear layer", _conv, (1, 8, 8))


def _digits(name: str, model: str, architecture: Callable[[], nn.Module], shape: tuple[int, ...]) -> Task:
    """scikit-learn's 1,797 real 8x8 digits, standardised by the mean and deviation of the training pixels."""
    datasets = need("sklearn.datasets", package="scikit-learn", purpose=f"for the data of the task {name!r}")
    data = datasets.load_digits()
    inputs = torch.as_tensor(data.data, dtype=torch.float32)
    targets = torch.as_tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(DATA_SEED))
    test, train = order.split([round(TEST_FRACTION * len(order)), len(order) - round(TEST_FRACTION * len(order))])
    std, mean = torch.std_mean(inputs[train])
    inputs = ((inputs - mean) / std).reshape(-1, *shape)
    return Task(
        name=name,
        summary=f"scikit-learn's handwritten digits, {len(train)} for training and {len(test)} for testing; {model}",
        make_model=lambda seed: _seeded(architecture, seed),
        make_criterion=nn.CrossEntropyLoss,
        train_inputs=inputs[train],
        train_targets=targets[train],
        test_inputs=inputs[test],
        test_targets=targets[test],
    )


def _seeded(architecture: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture()


_TASKS: dict[str, Callable[[], Task]] = {"digits_mlp": _digits_mlp, "digits_conv": _digits_conv}
