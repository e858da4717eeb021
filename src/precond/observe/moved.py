"""The batch of the step once more, at the parameters as they are now: gradients and true columns by replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.observe.grouping import by_layer
from precond.observe.guard import own_pass
from precond.observe.hooks import Handles
from precond.observe.observation import Columns, LayerColumns, Part, Tensors
from precond.observe.observer import Observer
from precond.observe.passes import batched_grad, nested_columns
from precond.observe.recorder import draws
from precond.observe.records import CriterionCall, Forward
from precond.observe.replay import replay, save_rng


def weight(observer: Observer) -> Tensor:
    """The sum of the weights of the step's parts."""
    return torch.stack([_weight(p) for p in _parts(observer)]).sum()


def slope(observer: Observer, names: Mapping[str, nn.Parameter]) -> Tensors:
    """The gradient of the step's parts as it reached the parameters, divided by the sum of their weights."""
    total, caught = weight(observer), observer.slope
    return {n: caught[n] / total.to(caught[n].dtype) if n in caught else torch.zeros_like(p) for n, p in names.items()}


def moved_slope(observer: Observer, names: Mapping[str, nn.Parameter]) -> Tensors:
    """The same gradient at the present parameters: one forward and backward pass for each criterion call."""
    parts, total = _parts(observer), weight(observer)
    out: Tensors = {}
    for part in parts:
        output = replay(part, observer.model)
        found = batched_grad([output], list(names.values()), [_cotangent(part, output)])
        factor = _weight(part) / total * _scale(part)
        for (name, p), g in zip(names.items(), found, strict=True):
            value = torch.zeros_like(p) if g is None else g[0].detach() * factor.to(g.dtype)
            out[name] = out[name] + value if name in out else value
    return out


def losses(observer: Observer) -> tuple[Tensor, Tensor]:
    """The loss of the step's parts, divided by the sum of their weights: as it was, and at the present parameters, by one forward pass each."""
    total, before, after = weight(observer), [], []
    for part in _parts(observer):
        share = _weight(part) / total
        before.append(share * _loss(part, part.output))
        after.append(share * _loss(part, replay(part, observer.model, graph=False)))
    return torch.stack(before).sum(), torch.stack(after).sum()


def _loss(part: CriterionCall, output: Tensor) -> Tensor:
    if part.criterion is None:
        raise ObservationError(
            "the loss after the update needs the criterion itself, which `observe(loss, output, target)` does not give: attach a criterion module, "
            "or use a damping that does not follow the loss."
        )
    wide = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    with own_pass(), torch.no_grad():
        return part.likelihood.loss(part.criterion, wide, part.target).to(torch.float64)


def moved_columns(observer: Observer, number: int) -> Columns:
    """The true columns of demand `number` at the present parameters."""
    parts, layers, total = _parts(observer), observer.demands[number].layers, weight(observer)
    made = []
    for part in parts:
        seen = _replayed_columns(part, observer, layers)
        made.append(Part(_weight(part) / total, _scale(part), part.forward.batch, by_layer(seen)))
    return Columns(tuple(made), total)


def _replayed_columns(part: CriterionCall, observer: Observer, layers: frozenset[str]) -> list[LayerColumns]:
    """One part's pass again, with its layers watched."""
    again = replace(part.forward, calls=[], outputs=[])
    handles = Handles()
    for name in layers:
        module = observer.layers[name]
        handles.add(module.register_forward_hook(_watch(again, observer, name), with_kwargs=True))
        if draws(module):
            handles.add(module.register_forward_pre_hook(_before(observer, name)))
    try:
        output = replay(part, observer.model)
    finally:
        handles.remove()
    return nested_columns(replace(part, forward=again, output=output, nodes={}), _cotangent(part, output), layers)


def _watch(forward: Forward, observer: Observer, name: str) -> Any:
    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        args, kwargs, handed_on = observer.spread(name, args, kwargs, output, forward.batch)
        forward.calls.append(observer.call(name, module, args, kwargs, handed_on))
        return None if handed_on is output else handed_on

    return seen


def _before(observer: Observer, name: str) -> Any:
    def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
        observer.states[name] = save_rng(next(module.parameters()).device)

    return seen


def _cotangent(part: CriterionCall, output: Tensor) -> Tensor:
    """The true gradient of the sum over terms in the criterion's input, as one column."""
    return part.likelihood.gradient(output.detach(), part.target).to(output.dtype).unsqueeze(0)


def check_slope(caught: Tensors, again: Tensors) -> None:
    """Refuse pairs whose two gradients would not be of the same loss, by the first parameter that differs at the same point."""
    for name, gradient in caught.items():
        wide, other = gradient.to(torch.float64), again[name].to(torch.float64)
        difference, size = (wide - other).norm(), wide.norm()
        if bool(torch.isfinite(size)) and bool(difference > 100 * torch.finfo(gradient.dtype).eps ** 0.75 * size + torch.finfo(gradient.dtype).eps):
            raise ObservationError(
                f"the gradient of {name!r} is not that of the criterion calls alone (relative difference {float(difference / size):.1e}), and the "
                "gradient after the step will be: a loss that no attached criterion computes is added to it. Attach every criterion, or "
                "pass self_check=False if the difference is meant."
            )


def _parts(observer: Observer) -> list[CriterionCall]:
    if not observer.parts:
        raise ObservationError("no criterion call was differentiated in this step.")
    return observer.parts


def _weight(part: CriterionCall) -> Tensor:
    assert part.weight is not None
    return part.weight


def _scale(part: CriterionCall) -> Tensor:
    assert part.scale is not None
    return part.scale
