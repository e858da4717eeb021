"""The user's closure once more, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from precond.errors import UsageError
from precond.observe.guard import own_pass
from precond.observe.replay import save_rng


class Again:
    """Runs a closure at the present parameters for its loss alone, with the randomness there was when this was made.

    Gradients, buffers and generators are put back, and no hook of ours sees it.
    """

    def __init__(self, closure: Callable[[], Any], model: nn.Module, params: Sequence[Tensor]) -> None:
        self._closure, self._model, self._params = closure, model, list(params)
        self._device = self._params[0].device
        self._rng = save_rng(self._device)

    def __call__(self) -> Tensor:
        """The loss, 0-dim and in float64."""
        gradients = [p.grad for p in self._params]
        buffers = [(b, b.detach().clone()) for b in self._model.buffers()]
        for p in self._params:
            p.grad = None  # `zero_grad(set_to_none=False)` would write into them
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with own_pass(), torch.enable_grad(), torch.random.fork_rng(devices=devices):
                torch.set_rng_state(self._rng["cpu"])
                if "cuda" in self._rng:
                    torch.cuda.set_rng_state(self._rng["cuda"], self._device)
                return number(self._closure())
        finally:
            for p, gradient in zip(self._params, gradients, strict=True):
                p.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def number(loss: Any) -> Tensor:
    """The loss that a closure returned, 0-dim and in float64."""
    if not isinstance(loss, (Tensor, float, int)) or (isinstance(loss, Tensor) and loss.numel() != 1):
        raise UsageError(f"the closure returned {type(loss).__name__}, not the loss, which a line search needs: return it.")
    return torch.as_tensor(loss).detach().to(torch.float64).reshape(())
