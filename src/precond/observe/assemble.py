"""Records of a step into observations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.errors import ObservationError
from precond.observe.chain import ChainSums
from precond.observe.grouping import by_layer
from precond.observe.observation import Columns, Factors, LayerColumns, Part, Product, Tensors
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


def columns(observer: Observer, number: int) -> Columns:
    """The columns of demand `number` over all parts of the step."""
    parts, total = _weighted(observer)
    if number not in parts[0].columns:  # nothing was sent back for it: it lives on the user's own backward pass
        return Columns(tuple(_true_parts(parts, observer.demands[number].layers, total)), total)
    made = [Part(_weight(p) / total, _scale(p), p.forward.batch, by_layer(p.columns[number])) for p in parts]
    return Columns(tuple(made), total)


def reduced(observer: Observer, number: int) -> tuple[dict[str, dict[str, Tensor]], Tensor] | None:
    """Statistics by block that were reduced in the loss hook, normalised by the weights of the parts, and the sum of weights.

    Of a single part they are its own: who takes one out and drops it frees it.
    """
    parts, total = _weighted(observer)
    if any(number not in p.reduced for p in parts):
        return None
    if len(parts) == 1:  # its share is 1, and a copy would hold a second set of factors
        return parts[0].reduced[number], total
    out: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        share = _weight(part) / total
        for block, statistics in part.reduced[number].items():
            mine = out.setdefault(block, {})
            for name, value in statistics.items():
                scaled = value * share.to(value.dtype)
                mine[name] = mine[name] + scaled if name in mine else scaled
    return out, total


def factors(observer: Observer, number: int) -> Factors:
    """The inputs of the layers of demand `number` over all parts of the step."""
    parts, total = _weighted(observer)
    layers = observer.demands[number].layers
    made = []
    for part in parts:
        seen: dict[str, list[LayerColumns]] = defaultdict(list)
        for call in part.forward.calls:
            if call.name in layers:
                seen[call.name].append(call.columns([], part.forward.batch))
        made.append(Part(_weight(part) / total, _scale(part), part.forward.batch, {n: tuple(c) for n, c in seen.items()}))
    return Factors(tuple(made), total)


def chained(observer: Observer, number: int) -> tuple[ChainSums, Tensor, Tensor]:
    """The sums of demand `number` on this rank, every example with the weight c of one term: (sums, sum of c over examples, total weight)."""
    parts, total = _weighted(observer)
    pieces = [(_weight(p) / total * _scale(p), p.chained[number]) for p in parts]
    links = pieces[0][1].links
    if any(sums.links != links for _, sums in pieces):
        raise ObservationError(
            "the batches of this step differ in the shape of an example or in the layers that are trained, so that what is averaged over "
            "their examples does not add: give them one shape and the same layers, or use the matrix 'ggn'."
        )
    output = torch.stack([sums.output * weight.to(sums.output.dtype) for weight, sums in pieces]).sum(0)
    slopes = _weighted_sum((weight, sums.slopes) for weight, sums in pieces)
    count = torch.stack([_weight(p) / total * _scale(p) * p.forward.batch for p in parts]).sum()
    return ChainSums(links, output, slopes), count, total


def sampled_gradient(observer: Observer, number: int) -> tuple[Tensors, TermWeights]:
    """The mean gradient at drawn labels on this rank, sum c_i g_i by parameter; labels are drawn for every criterion call."""
    parts, total = _weighted(observer)
    values = _weighted_sum((_weight(p) / total * _scale(p), p.gradients[number]) for p in parts)
    return values, _term_weights([(_weight(p), _scale(p), _total(p)) for p in parts])


@dataclass(frozen=True)
class TermWeights:
    """Of the weights c_i = share * scale of the terms on this rank: sum c_i, sum c_i^2, and the total weight of their criterion calls."""

    first: Tensor
    second: Tensor
    total: Tensor


def term_weights(observer: Observer) -> TermWeights:
    """Of the terms of the true gradient: criterion calls on one forward pass form one."""
    parts, _ = _weighted(observer)
    groups = list(_joined(parts))
    return _term_weights([(weight, scale, torch.stack([_total(c) for c in calls])[heaviest]) for heaviest, weight, scale, calls in groups])


def _total(part: CriterionCall) -> Tensor:
    return part.likelihood.total(part.output, part.target)


def _term_weights(calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> TermWeights:
    """From the weight, the scale and the number of terms of each."""
    total = torch.stack([weight for weight, _, _ in calls]).sum()
    weights = torch.stack([weight / total * scale for weight, scale, _ in calls])
    terms = torch.stack([number.to(weights.dtype) for *_, number in calls])
    return TermWeights((weights * terms).sum(), (weights.square() * terms).sum(), total)


def _weighted(observer: Observer) -> tuple[list[CriterionCall], Tensor]:
    """The parts of the step and the sum of their weights."""
    if not observer.parts:
        raise ObservationError("no criterion call was differentiated in this step.")
    return observer.parts, torch.stack([_weight(p) for p in observer.parts]).sum()


def _true_parts(parts: Sequence[CriterionCall], layers: frozenset[str], total: Tensor) -> list[Part]:
    """The true gradient's columns: criterion calls on one forward pass, in one backward pass, form one term gradient.

    It is measured in units of the call of the largest weight: with losses c1 + 0.3 c2 a term gradient is g1 + 0.3 g2.
    """
    made = []
    for _, weight, scale, calls in _joined(parts):
        seen = true_columns(calls[0].forward, calls[0].backward, layers, weight * scale)
        made.append(Part(weight / total, scale, calls[0].forward.batch, by_layer(seen)))
    return made


def _joined(parts: Sequence[CriterionCall]) -> Iterator[tuple[Tensor, Tensor, Tensor, list[CriterionCall]]]:
    """Criterion calls by forward and backward pass: which has the largest weight, that weight, its scale, and the calls."""
    groups: dict[tuple[int, int], list[CriterionCall]] = defaultdict(list)
    for part in parts:
        groups[id(part.forward), part.backward].append(part)
    for calls in groups.values():
        weights = torch.stack([_weight(c) for c in calls])
        heaviest = weights.abs().argmax()
        yield heaviest, weights[heaviest], torch.stack([_scale(c) for c in calls])[heaviest], calls


Mean = Callable[[], tuple[Tensors, Tensor]]


def product(
    observer: Observer, number: int, params: Mapping[str, Tensor], curvature: Callable[[CriterionCall], OutputCurvature | None],
    elsewhere: bool = False,
) -> tuple[Product, Mean]:  # fmt: skip
    """A live product over all parts of the step, on this rank, divided by the sum of their weights; and its mean.

    curvature(part) is None where the matrix is the Hessian of the loss itself. The mean, for a matrix that is centred,
    is (sum c_i g_i by parameter, sum c_i) over examples, c_i = share * scale. elsewhere: `params` are leaves that stand in the model's place.
    """
    at = params if elsewhere else None
    parts, total = _weighted(observer)
    terms: list[tuple[Tensor, Linearised | SecondOrder, CriterionCall]] = []
    for part in parts:
        output_curvature = curvature(part)
        weight = _weight(part) / total
        if output_curvature is None:
            terms.append((weight, SecondOrder(part, observer.model, params, at), part))
        else:
            terms.append((weight * _scale(part), Linearised(part, observer.model, params, output_curvature, at), part))

    def local(vectors: Tensors) -> Tensors:
        return _weighted_sum((weight, term(vectors)) for weight, term, _ in terms)

    def mean() -> tuple[Tensors, Tensor]:
        pulled = ((w, t.pull(p.likelihood.gradient(p.output, p.target))) for w, t, p in terms if isinstance(t, Linearised))
        return _weighted_sum(pulled), torch.stack([w * p.forward.batch for w, _, p in terms]).sum()

    return Product(local, total), mean


def _weighted_sum(terms: Iterable[tuple[Tensor, Tensors]]) -> Tensors:
    out: Tensors = {}
    for weight, values in terms:
        for name, value in values.items():
            scaled = value * weight.to(value.dtype)
            out[name] = out[name] + scaled if name in out else scaled
    return out
