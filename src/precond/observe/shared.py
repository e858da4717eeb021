"""Layers that are called once for all examples: position embeddings, whose output is broadcast over the batch.

The gradient at such an output is a sum over examples that nothing can take apart. So the output is handed on expanded,
as a view of the same numbers, and the call counts as one on the expanded input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

SHARED = "shared"
"""The layout of `rows=` that asks for it."""


def over_examples(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(args, kwargs, output) with the batch in front where the call was on (1, ...) or on one row of indices; else as they are."""
    given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    if given is None or not isinstance(output, Tensor) or output.dim() < 2:
        return args, kwargs, output
    if given.dim() == 1 and not given.is_floating_point():
        args, kwargs = _map(args, kwargs, lambda t: t.unsqueeze(0))
        output = output.unsqueeze(0) if output.dim() == 2 else output  # another preconditioner on the same model expanded it
    elif given.dim() < 2 or given.shape[0] != 1:
        return args, kwargs, output
    args, kwargs = _map(args, kwargs, lambda t: _expand(t, batch))
    return args, kwargs, _expand(output, batch)


def _expand(tensor: Tensor, batch: int) -> Tensor:
    return tensor.expand(batch, *tensor.shape[1:]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _map(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(change(a) if isinstance(a, Tensor) else a for a in args), {
        n: change(a) if isinstance(a, Tensor) else a for n, a in kwargs.items()
    }
