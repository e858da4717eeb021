"""One batch under an observer, differentiated without a backward pass into `.grad`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.likelihoods import Likelihood, weigh
from precond.observe.observation import Tensors
from precond.observe.observer import Observer, Target
from precond.observe.trees import field_of, tensors_in


def _criterion_input(output: Any) -> Tensor:
    """The model's output, its `logits`, or the one tensor in it that can be differentiated."""
    if isinstance(output, Tensor):
        return output
    logits = field_of(output, "logits")
    found = [logits] if isinstance(logits, Tensor) else [t for t in tensors_in(output) if t.requires_grad]
    if len(found) != 1:
        raise ObservationError(
            f"the model returns a {type(output).__name__} that holds {len(found)} tensors with a gradient and no `logits`, and the criterion takes "
            "one tensor: wrap the model to return it."
        )
    return found[0]


def differentiate_batch(
    observer: Observer, criterion: nn.Module, likelihood: Likelihood, inputs: Any, targets: Target, params: Mapping[str, nn.Parameter]
) -> tuple[Tensor, Tensors]:
    """Add the batch to the observer's parts; returns its weight among batches and the gradient of its loss in `params`.

    The weight is the number that a mean divides by, and 1 for a sum. An unreduced loss is taken by its mean. targets: the
    target, or a tuple of all that the criterion is called with after the output.
    """
    if isinstance(inputs, Mapping):
        output = observer.model(**inputs)
    elif isinstance(inputs, tuple):
        output = observer.model(*inputs)
    else:
        output = observer.model(inputs)
    output = _criterion_input(output)
    loss = criterion.forward(output, *(targets if isinstance(targets, tuple) else (targets,)))
    part = observer.record(output, targets, likelihood, criterion)
    if part is None:
        raise ObservationError("the model's output depends on no trainable parameter, so it has no curvature.")
    ones = torch.ones_like(loss)
    part.likelihood, unit, part.scale = weigh(part.likelihood, part.output.detach(), part.target, ones)
    part.weight = 1.0 / part.scale if likelihood.reduction != "sum" else torch.ones_like(part.scale)
    if observer.selfcheck is not None and observer.selfcheck.pending:
        observer.selfcheck.batch(part, observer.model, frozenset(observer.layers))
    gradient: Tensors = {}
    if params:
        found = torch.autograd.grad(loss, list(params.values()), ones / unit.to(loss.dtype), retain_graph=True, allow_unused=True)
        gradient = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}
    for number, demand in enumerate(observer.demands):
        if demand.kind == "columns" and demand.reduce is not None:
            part.reduced[number] = observer.reduced(part, number, demand.reduce)
        elif demand.kind in ("columns", "layer_secant"):
            part.columns[number] = observer.nested(part, number)
        elif demand.sampled:
            part.gradients[number] = observer.sampled(part, number)
        elif demand.chained:
            part.chained[number] = observer.chained(part, number)
    for call in part.forward.calls:  # the graph of a batch lives no longer than its turn
        call.edges = [None] * len(call.edges)
    part.nodes, part.output = {}, part.output.detach()
    observer.parts.append(part)
    return part.weight, gradient
