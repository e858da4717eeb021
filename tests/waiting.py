"""Whether the host waits for the device, asked of any device: a mode that refuses what reads a tensor's values on the host.

Claims: `Ban` raises `Waits` at .item(), bool(), int(), float(), .tolist(), .numpy(), .cpu(), a boolean index, nonzero, masked_select, unique and the
like. What is read for nothing on a CPU alone (`where_valid`, events of the logging channel) takes its way of other devices within
`as_on_a_device`, so that a CPU shows what CUDA would do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from precond import directions, merging, numerics
from precond.events import Events


class Waits(AssertionError):
    """The host waited."""


METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero")
OPERATIONS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "is_nonzero", "equal", "bincount",
    "_assert_async", "repeat_interleave.Tensor",
)  # fmt: skip


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name in OPERATIONS or name.split(".")[0] in OPERATIONS:
            raise Waits(f"{name} reads a tensor on the host")
        if name.split(".")[0] in ("index", "index_put", "index_put_"):
            if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
                raise Waits("a boolean index has as many entries as the device says")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            raise Waits(f"Tensor.{func.__name__} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def ban() -> Iterator[None]:
    """Within it the host may not wait."""
    with _Methods(), _Operations():
        yield


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU reads for nothing is not read."""

    def everywhere(valid: Tensor, value: Tensor) -> Tensor:
        return torch.where(valid, value, 0.0)

    for module in (numerics, merging, directions):
        if hasattr(module, "where_valid"):
            monkeypatch.setattr(module, "where_valid", everywhere)
    monkeypatch.setattr(Events, "tell", lambda self, name, block, step, number: None)
