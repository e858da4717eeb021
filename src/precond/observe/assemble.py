"""Records of a step into observations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.observe.observation import Columns, LayerColumns, Part, Product, Tensors
from precond.observe.observer import Observer
from precond.observe.records import CriterionCall
from precond.observe.replay import Linearised, OutputCurvature, SecondOrder
from precond.observe.truth import true_columns


def _weight(part: CriterionCall) -> Tensor:
    assert part.weight is not None
    return part.weight


def _scale(part: CriterionCall) -> Tensor:
    assert part.scale is not None
    return part.scale


def by_layer(columns: Sequence[LayerColumns]) -> dict[str, tuple[LayerColumns, ...]]:
    """Calls grouped by layer; one that nothing came back to carries no columns and is left out."""
    grouped: dict[str, list[LayerColumns]] = defaultdict(list)
    for call in columns:
        if any(g is not None for g in call.grads):
            grouped[call.name].append(call)
    return {name: tuple(calls) for name, calls in grouped.items()}


def columns(observer: Observer, number: int) -> Columns:
    """The columns of demand `number` over all parts of the step."""
    parts = observer.parts
    if not parts:
        raise ObservationError("no criterion call was differentiated in this step.")
    total = torch.stack([_weight(p) for p in parts]).sum()
    if number not in parts[0].columns:  # nothing was sent back for it: it lives on the user's own backward pass
        return Columns(tuple(_true_parts(parts, observer.demands[number].layers, total)), total)
    made = [Part(_weight(p) / total, _scale(p), p.forward.batch, by_layer(p.columns[number])) for p in parts]
    return Columns(tuple(made), total)


def _true_parts(parts: Sequence[CriterionCall], layers: frozenset[str], total: Tensor) -> list[Part]:
    """The true gradient's columns: criterion calls on one forward pass, in one backward pass, form one term gradient.

    It is measured in units of the call of the largest weight: with losses c1 + 0.3 c2 a term gradient is g1 + 0.3 g2.
    """
    groups: dict[tuple[int, int], list[CriterionCall]] = defaultdict(list)
    for part in parts:
        groups[id(part.forward), part.backward].append(part)
    made = []
    for (_, backward), calls in groups.items():
        weights = torch.stack([_weight(c) for c in calls])
        heaviest = weights.abs().argmax()
        weight, scale = weights[heaviest], torch.stack([_scale(c) for c in calls])[heaviest]
        seen = true_columns(calls[0].forward, backward, layers, weight * scale)
        made.append(Part(weight / total, scale, calls[0].forward.batch, by_layer(seen)))
    return made


def product(
    observer: Observer, number: int, params: dict[str, nn.Parameter], curvature: Callable[[CriterionCall], OutputCurvature | None]
) -> Product:
    """A live product over all parts of the step, on this rank, divided by the sum of their weights.

    curvature(part) is None where the matrix is the Hessian of the loss itself.
    """
    parts = observer.parts
    if not parts:
        raise ObservationError("no criterion call was differentiated in this step.")
    total = torch.stack([_weight(p) for p in parts]).sum()
    terms: list[tuple[Tensor, Linearised | SecondOrder]] = []
    for part in parts:
        output_curvature = curvature(part)
        weight = _weight(part) / total
        if output_curvature is None:
            terms.append((weight, SecondOrder(part, observer.model, params)))
        else:
            terms.append((weight * _scale(part), Linearised(part, observer.model, params, output_curvature)))

    def local(vectors: Tensors) -> Tensors:
        out: Tensors = {}
        for weight, term in terms:
            for name, value in term(vectors).items():
                scaled = value * weight.to(value.dtype)
                out[name] = out[name] + scaled if name in out else scaled
        return out

    return Product(local, total)
