"""The recorder: hooks on a model and its layers, and a record of every forward pass of an observed step."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from precond.errors import UsageError
from precond.observe.guard import busy
from precond.observe.hooks import Handles, Hook
from precond.observe.observation import Drawn
from precond.observe.records import Call, Clock, Forward
from precond.observe.replay import save_rng
from precond.observe.shared import SHARED, over_examples
from precond.observe.trees import apart, detached, tensors_in, versions

_keys = itertools.count()
_LIVE_FORWARDS = 16  # graphs of never-differentiated forward passes with several outputs that may be alive at once


class Recorder(ABC):
    """Opens a record in the model's pre-hook, fills it in the layers' hooks, closes it in the model's hook.

    `due()` says whether the present step observes. `renew()` gives the recorder that takes this one's place where the
    model's parameters changed since it was made.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], due: Callable[[], bool], rows: Mapping[str, str],
        renew: Callable[[], Self | None],
    ) -> None:  # fmt: skip
        self.model, self.layers = model, dict(layers)
        self.due, self.rows, self.renew = due, dict(rows), renew
        self.clock = Clock()
        self._key = f"precond.{next(_keys)}"
        self._handles, self._layer_handles = Handles(), Handles()
        self._open: Forward | None = None
        self._before: dict[str, tuple[Tensor, int, Tensor]] = {}  # buffers before the present pass: themselves, their version, a copy
        self.states: dict[str, dict[str, Tensor]] = {}  # of the generators, before the present call of a layer that draws
        self._multi_output: deque[weakref.ref[Forward]] = deque()

    @abstractmethod
    def _wants_true_columns(self) -> bool:
        """Whether the user's own backward pass is to leave its gradients at the layers."""

    @abstractmethod
    def _keeps_outputs(self) -> bool:
        """Whether the pass will be run again, and compared with what the criterion was given."""

    def watch_model(self) -> None:
        """Hang the two hooks on the model; those on the layers come and go with observed forward passes."""
        self._handles.add(
            self.model.register_forward_pre_hook(Hook(self._begin_forward), with_kwargs=True),
            self.model.register_forward_hook(Hook(self._end_forward), with_kwargs=True, always_call=True),
        )

    def _idle(self) -> bool:
        return busy() or not torch.is_grad_enabled() or not self.due()

    def _begin_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if busy():
            return
        self.clock.backward = None  # a backward pass that raised never told us that it ended
        self._layer_handles.remove()
        self._open = None
        if self._idle() or _substituted(model):
            return
        renewed = self.renew()
        if renewed is not None:  # its own hooks, hung during this call, are called from the end of this pass on
            renewed._begin_forward(model, args, kwargs)
            return
        tensor = next((t for t in tensors_in((args, kwargs)) if t.dim()), None)
        if tensor is not None and not len(tensor):
            raise UsageError("a batch of inputs holds no examples: curvature needs at least one. Leave such a batch out.")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._open = Forward(
            args, kwargs, batch=1 if tensor is None else tensor.shape[0], versions=versions((args, kwargs)),
            rng=save_rng(device), autocast=(device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
        )  # fmt: skip
        if self._keeps_outputs():
            self._before = {n: (b, b._version, b.detach().clone()) for n, b in model.named_buffers() if not b.is_inference()}
        true_columns = self._wants_true_columns()
        for name, module in self.layers.items():
            if module is not model:  # the model as a layer of its own is seen when its forward pass ends
                hook = Hook(self._after_layer, name, true_columns)
                self._layer_handles.add(module.register_forward_hook(hook, with_kwargs=True))
                if draws(module):
                    self._layer_handles.add(module.register_forward_pre_hook(Hook(self._before_drawing, name)))

    def _after_layer(
        self, name: str, true_columns: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        forward = self._open
        if forward is None or busy():
            return None
        if not torch.is_grad_enabled():
            forward.without_grad = True
            return None
        args, kwargs, handed_on = self.spread(name, args, kwargs, apart(output), forward.batch)
        forward.calls.append(self.call(name, module, args, kwargs, handed_on, true_columns))
        return None if handed_on is output else handed_on

    def _before_drawing(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not busy():
            self.states[name] = save_rng(next(module.parameters()).device)

    def _layout(self, name: str) -> str | None:
        return next((layout for pattern, layout in self.rows.items() if fnmatchcase(name, pattern)), None)

    def spread(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """(args, kwargs, output) of a layer's call, expanded over the batch where `rows=` says that all examples share it."""
        return over_examples(args, kwargs, output, batch) if self._layout(name) == SHARED else (args, kwargs, output)

    def call(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, true_columns: bool = False
    ) -> Call:  # fmt: skip
        """The record of one call of a layer, in its forward hook."""
        edges: list[GradientEdge | int | None] = []
        slots: list[list[tuple[int, Tensor]]] = []
        for tensor in tensors_in(output):
            slot: list[tuple[int, Tensor]] = []
            slots.append(slot)
            edges.append(get_gradient_edge(tensor) if tensor.requires_grad else None)
            if true_columns and tensor.requires_grad:
                tensor.register_hook(_keep_gradient(slot, self.clock))
        numbers = [e.output_nr if isinstance(e, GradientEdge) else 0 for e in edges]
        inputs = (detached(args), detached(kwargs))
        size = sum(tensor.numel() for tensor in tensors_in(output))
        rows = layout if (layout := self._layout(name)) != SHARED else None  # it has the batch in front by now, as other layers do
        states, outputs = self.states.pop(name, None), list(tensors_in(output))
        drawn = Drawn(states, outputs[0].detach()) if states is not None else None
        return Call(name, module, *inputs, module.training, rows, edges, numbers, slots, versions(inputs), size, drawn)

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if busy():
            return
        self._layer_handles.remove()
        for name, module in self.layers.items():
            if module is model:
                self._after_layer(name, self._wants_true_columns(), model, args, kwargs, output)
        forward, self._open = self._open, None
        if forward is None:
            return
        nodes = [tensor.grad_fn for tensor in tensors_in(output)]
        forward.shapes = [tensor.shape for tensor in tensors_in(output)]
        if self._keeps_outputs():
            forward.outputs = [tensor.detach() for tensor in tensors_in(output)]
            now = dict(model.named_buffers())
            forward.buffers = {n: old for n, (b, version, old) in self._before.items() if now.get(n) is not b or b._version != version}
            self._before = {}
        for number, node in enumerate(nodes):
            if node is None:
                continue
            # The node keeps the record and the record, upstream of it, not the node: dropping the output frees both.
            carried: dict[str, Any] = node.metadata  # type: ignore[assignment]  # torch declares it a method
            carried.setdefault(self._key, (forward, number))
            for call in forward.calls:
                call.edges = [number if isinstance(e, GradientEdge) and e.node is node else e for e in call.edges]
        if len({id(node) for node in nodes if node is not None}) > 1:
            self._bound(forward)

    def _bound(self, forward: Forward) -> None:
        """Records of forward passes with several outputs can be part of a cycle: only so many may stay undifferentiated."""
        self._multi_output.append(weakref.ref(forward))
        while len(self._multi_output) > _LIVE_FORWARDS:
            oldest = self._multi_output.popleft()()
            if oldest is not None and not oldest.differentiated:
                oldest.calls.clear()


def _substituted(model: nn.Module) -> bool:
    """Whether this pass runs on tensors of the caller's own, as `torch.func.functional_call` does, and trains none of the model's."""
    held = [isinstance(p, nn.Parameter) for p in model.parameters() if p.requires_grad or not isinstance(p, nn.Parameter)]
    return bool(held) and not any(held)


def draws(module: nn.Module) -> bool:
    """Whether a call of the module draws random numbers in its own code (children have hooks of their own)."""
    rate = getattr(module, "dropout", 0.0)
    return module.training and isinstance(rate, float) and rate > 0


def _keep_gradient(slot: list[tuple[int, Tensor]], clock: Clock) -> Callable[[Tensor], None]:
    """A tensor hook that keeps the true gradient; it holds the slot and the clock, never an observer or a graph."""

    def keep(gradient: Tensor) -> None:
        if clock.backward is not None and not busy():
            slot.append((clock.backward, gradient.detach()))

    return keep
