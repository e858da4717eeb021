"""From the model's output to the criterion's input, when the forward pass is run again.

A replay runs the model, but what happens between the model and the criterion (`criterion(model(x).view(-1, C), y)`)
is the user's code and is not run. The rearrangements people use are found by comparing values; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from precond.errors import ObservationError

Bridge = Callable[[Tensor], Tensor]


def _candidates(given: Tensor, wanted: Tensor) -> Iterator[Bridge]:
    shape = wanted.shape
    if given.numel() == wanted.numel():
        yield lambda t: t.reshape(shape)
        if given.dim() > 2:
            yield lambda t: t.movedim(-1, 1).reshape(shape)
            yield lambda t: t.movedim(1, -1).reshape(shape)
            yield lambda t: t.transpose(0, 1).reshape(shape)
    if given.dim() == 3 and given.shape[1] > 1:  # next-token prediction: the last position has no label
        if given[:, :-1].numel() == wanted.numel():
            yield lambda t: t[:, :-1].reshape(shape)
        if given[:, -1].numel() == wanted.numel():
            yield lambda t: t[:, -1].reshape(shape)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN; the same memory is not read, so that the usual case does not wait for the device."""
    if a.data_ptr() == b.data_ptr() and a.is_contiguous() and b.is_contiguous():
        return True
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def find_bridge(model_output: Tensor, criterion_input: Tensor) -> Bridge:
    """The rearrangement that takes the model's output to what the criterion was given."""
    given, wanted = model_output.detach(), criterion_input.detach().to(model_output.dtype)
    for bridge in _candidates(given, wanted):
        if _same(bridge(given), wanted):
            return bridge
    raise ObservationError(
        f"the criterion's input {tuple(wanted.shape)} is not a rearrangement of the model's output {tuple(given.shape)}, so the forward "
        "pass cannot be run again for products with the curvature: let the model return what the criterion takes, or use a matrix and "
        "representation that need no replay."
    )
