"""The gradient of one backward pass as it reaches the parameters, before an all-reduce, an accumulation or clipping."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor, nn

from precond.observe.guard import busy
from precond.observe.hooks import Handles
from precond.observe.names import canonical
from precond.observe.observation import Tensors


class GradientCatch:
    """Hooks on the named parameters, from the beginning of a backward pass to its end."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self._seen: Tensors = {}
        self._handles = Handles()

    def begin(self, model: nn.Module) -> None:
        """Start anew, also where the pass before raised and never ended."""
        self._handles.remove()
        self._seen = {}
        for name, param in model.named_parameters():
            if param.requires_grad and canonical(name) in self.names:
                self._handles.add(param.register_hook(_catcher(self._seen, canonical(name))))

    def end(self) -> Tensors:
        """What was seen, by canonical name."""
        self._handles.remove()
        seen, self._seen = self._seen, {}
        return seen


def _catcher(seen: Tensors, name: str) -> Callable[[Tensor], None]:
    def catch(gradient: Tensor) -> None:
        if not busy():
            seen[name] = gradient.detach().clone()  # the tensor may become p.grad itself, which the loop then changes

    return catch
