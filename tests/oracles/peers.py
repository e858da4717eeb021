"""What the tests against public packages share: one of them, and the networks that all of them know."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from nets import CASES, Case, labels, normal, seeded

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    import curvlinops

__all__ = ["NETS", "close", "curvlinops", "in_double"]

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@contextmanager
def in_double() -> Iterator[None]:
    """Where a peer makes a tensor without a dtype. Make networks outside: their weights are drawn in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )


def _case(name: str, criterion: nn.Module, inputs: Tensor, targets: Tensor) -> Case:
    return Case(name, lambda: seeded(_conv if inputs.dim() > 2 else _mlp), criterion, inputs, targets)


_X, _LABELS, _REAL, _BITS = CASES["mlp"].inputs, CASES["mlp"].targets, normal(6, 3, seed=5), labels(2, 6, 3).double()

NETS = {
    case.name: case
    for reduction in ("mean", "sum")
    for case in (
        _case(f"mlp-{reduction}", nn.CrossEntropyLoss(reduction=reduction), _X, _LABELS),
        _case(f"conv-{reduction}", nn.CrossEntropyLoss(reduction=reduction), normal(4, 2, 6, 6), labels(3, 4)),
        _case(f"mse-{reduction}", nn.MSELoss(reduction=reduction), _X, _REAL),
        _case(f"bce-{reduction}", nn.BCEWithLogitsLoss(reduction=reduction), _X, _BITS),
    )
}
