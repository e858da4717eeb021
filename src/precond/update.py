"""From the observations of a step to refreshed blocks: measure, reduce over ranks, merge, refresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from precond import numerics, observe
from precond.blockstate import BlockState, finite
from precond.distributed import Group
from precond.observe import (
    Columns,
    CriterionCall,
    Factors,
    Gradient,
    Moved,
    Observation,
    Observer,
    Pair,
    Probes,
    Product,
    Slope,
    Tensors,
    TermWeights,
)
from precond.plan import Plan


@dataclass(frozen=True)
class Measured:
    """Columns that were reduced in the loss hook: statistics by block, each taken out once."""

    blocks: dict[str, dict[str, Tensor]]
    weight: Tensor


_REDUCED = (Gradient, Pair, Probes, Slope)  # what is the same on all ranks already
Observations = Sequence[Observation | Measured] | Mapping[int, Observation]
"""By demand."""


class Assembly:
    """The observations of one step, by demand.

    loss_weights: "normalised" divides by the sum of the weights over parts and ranks; "given" multiplies a statistic of
    degree d by (sum of weights)^d, and divides the sum by AMP's scale.
    """

    def __init__(self, plan: Plan, observer: Observer, group: Group, loss_weights: str, amp_scale: float) -> None:
        self.plan, self.observer, self.group = plan, observer, group
        self.given, self.amp_scale = loss_weights == "given", amp_scale

    def observations(self, gradients: Tensors, moved: Tensors) -> list[Observation | Measured]:
        """moved: what is preconditioned, after transforms, by parameter, where a matrix is of it."""
        matrices: list[Any] = [demand.matrix for demand in self.plan.demands]
        return [self._one(number, moved if matrix.of_momentum else gradients) for number, matrix in enumerate(matrices)]

    def _one(self, number: int, gradients: Tensors) -> Observation | Measured:
        demand = self.plan.demands[number]
        matrix: Any = demand.matrix
        if demand.kind == "gradient":
            return self._gradient(number, gradients)
        if demand.kind == "whitening":
            return observe.whitening(self._gradient(number, gradients).values, *self._key(number))
        if demand.kind == "pairs":
            return observe.probes({n: p.detach() for n, p in demand.params.items()}, self._product(number), *self._key(number))
        if demand.kind == "columns" and (early := observe.reduced(self.observer, number)) is not None:
            return Measured(*early)
        if demand.kind == "columns":
            return replace(observe.columns(self.observer, number), centred=matrix.centred)
        if demand.kind == "layer_secant":
            return observe.columns(self.observer, number)
        if demand.kind == "successive":
            return Slope({n: p.detach() for n, p in demand.params.items()}, self.slope(demand.params, check=False), matrix.rule)
        if demand.kind == "factors":
            return self._chained(number) if matrix.chained else observe.factors(self.observer, number)
        return self._product(number)

    def _key(self, number: int) -> tuple[int, int, int]:
        """Of the random vectors of a demand, the same on all ranks."""
        return self.observer.seed(), self.observer.step(), number

    def _gradient(self, number: int, gradients: Tensors) -> Gradient:
        demand = self.plan.demands[number]
        matrix: Any = demand.matrix
        if demand.sampled:
            return self._sampled(number)
        mine = {n: gradients[n] for n in demand.params}
        return Gradient(self._per_term(mine) if matrix.counts_terms else mine)

    def after(self, start: Tensors, slope: Tensors) -> dict[int, Observation]:
        """By demand, what can be observed only after the optimizer's update; start and slope: the parameters and the gradient before it."""
        return {
            number: self._pair(number, start, slope) if demand.kind == "secant" else self._moved(number)
            for number, demand in enumerate(self.plan.demands) if demand.kind in ("secant", "layer_secant")
        }  # fmt: skip

    def _moved(self, number: int) -> Moved:
        matrix: Any = self.plan.demands[number].matrix
        return Moved(observe.moved_columns(self.observer, number), matrix.rule)

    def _pair(self, number: int, start: Tensors, slope: Tensors) -> Pair:
        demand = self.plan.demands[number]
        matrix: Any = demand.matrix
        steps = {n: p.detach() - start[n] for n, p in demand.params.items()}
        if matrix.second_order:
            product = self._product(number)({n: s.unsqueeze(0) for n, s in steps.items()})
            return Pair(steps, {n: h.squeeze(0) for n, h in product.items()}, matrix.rule)
        moved = self._over_ranks(observe.moved_slope(self.observer, demand.params), observe.weight(self.observer))
        return Pair(steps, {n: g - slope[n] for n, g in moved.items()}, matrix.rule)

    def slope(self, names: Mapping[str, nn.Parameter], check: bool) -> Tensors:
        """The gradient of the step's criterion calls over all ranks, whatever the loop did to p.grad since; check: compare it with a replay."""
        caught = observe.slope(self.observer, names)
        if check:
            observe.check_slope(caught, observe.moved_slope(self.observer, names))
        return self._over_ranks(caught, observe.weight(self.observer))

    def _over_ranks(self, local: Tensors, weight: Tensor) -> Tensors:
        factor = self._factor(weight)
        return dict(zip(local, self.group.sum([v * factor.to(v.dtype) for v in local.values()]), strict=True))

    def _sampled(self, number: int) -> Gradient:
        """sqrt(N) g at drawn labels over all ranks."""
        values, weights = observe.sampled_gradient(self.observer, number)
        root, summed = self._root_of_terms(weights, list(values.values()))
        return Gradient(dict(zip(values, (v * root.to(v.dtype) for v in summed), strict=True)))

    def _per_term(self, gradients: Tensors) -> Tensors:
        """sqrt(N) g of the step's own gradient, which is that of all ranks already."""
        root, _ = self._root_of_terms(observe.term_weights(self.observer), [])
        return {n: g * root.to(g.dtype) for n, g in gradients.items()}

    def _root_of_terms(self, weights: TermWeights, local: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """sqrt(N) over all ranks, N = sum c_i / sum c_i^2 with c_i the weights of the terms; and the sums over ranks of `local`."""
        share = self._factor(weights.total)
        moments = [weights.first * share, weights.second * share.square()]
        first, second, *summed = self.group.sum([*moments, *(v * share.to(v.dtype) for v in local)])
        return (first / second).sqrt(), summed

    def _chained(self, number: int) -> Factors:
        """Moments of inputs by rank, those of outputs from sums over the ranks with good data: what is not linear in them comes after."""
        matrix: Any = self.plan.demands[number].matrix
        sums, count, weight = observe.chained(self.observer, number)
        local = [count, sums.output, *sums.slopes.values()]
        good = numerics.all_finite(local)
        weight = torch.where(good, weight, 0.0)
        share = weight / self.group.sum([weight])[0]  # NaN where no rank has any, and so is all that is made of it
        count, output, *slopes = self.group.sum([torch.where(good, v, torch.zeros_like(v)) * share.to(v.dtype) for v in local])
        means = {name: v / count.to(v.dtype) for name, v in zip(sums.slopes, slopes, strict=True)}
        with numerics.full_precision(output.device.type):
            outputs = matrix.output_moments(sums.links, output, means)
        return replace(observe.factors(self.observer, number), outputs=outputs)

    def _product(self, number: int) -> Product:
        return self.product(self.plan.demands[number].matrix, number, {n: self.plan.partition.tensors[n] for n in self.names(number)})

    def names(self, number: int) -> list[str]:
        """The parameters of the blocks of a demand."""
        names = {p.name for plan in self.plan.blocks if plan.demand == number for p in plan.block.parameters}
        return [n for n in self.plan.partition.tensors if n in names]

    def losses(self) -> tuple[Tensor, Tensor]:
        """The loss of the step's criterion calls over all ranks, as it was and at the present parameters."""
        factor = self._factor(observe.weight(self.observer))
        before, after = self.group.sum([loss * factor for loss in observe.losses(self.observer)])
        return before, after

    def product(self, matrix: Any, number: int, params: Mapping[str, Tensor], elsewhere: bool = False) -> Product:
        """The map v -> C v, in the block of `params`; number: what keys its draws. elsewhere: at leaves in the place of the parameters."""

        def curvature(part: CriterionCall) -> Any:
            if matrix.second_order:
                return None
            context = self.observer.context(part, number)
            frozen = matrix.frozen(context)
            return lambda output, vector: matrix.output_product(context, frozen, vector)

        product, mean = observe.product(self.observer, number, params, curvature, elsewhere)
        factor = self._factor(product.weight)

        def over_ranks(local: Tensors) -> Tensors:
            return self._over_ranks(local, product.weight)

        if not matrix.centred:
            return Product(product.local, product.weight, lambda vectors: over_ranks(product.local(vectors)))
        values, count = mean()
        first, total = over_ranks(values), self.group.sum([count * factor])[0]

        def centred(vectors: Tensors) -> Tensors:
            inner = torch.stack([(first[n] * v).reshape(len(v), -1).sum(1) for n, v in vectors.items()]).sum(0)
            out = over_ranks(product.local(vectors))
            return {n: v - first[n] * (inner / total.to(v.dtype)).view(-1, *[1] * (v.dim() - 1)) for n, v in out.items()}

        return Product(product.local, product.weight, centred)

    def _factor(self, weight: Tensor) -> Tensor:
        """What this rank's normalised product is multiplied by before the sum over ranks."""
        if self.given:
            return weight / (self.amp_scale * self.group.size)
        return weight / self.group.sum([weight])[0]

    def merge(self, blocks: Sequence[BlockState], observations: Observations, stage: str) -> dict[str, Tensor]:
        """Measure one stage of every block, sum over ranks by kind, and merge; returns a valid flag for each block, by name."""
        staged = [b for b in blocks if stage in (*b.plan.repr.stages, *b.plan.repr.after)]
        chosen = [b for b in staged if _observed(b, observations[b.plan.source(stage)])]
        if not chosen:
            return {}
        sources = [observations[b.plan.source(stage)] for b in chosen]
        with numerics.full_precision(_device(chosen[0]).type):
            for block in chosen:
                block.prepare(stage)
            measured = [_measure(b, stage, source) for b, source in zip(chosen, sources, strict=True)]
        flags = [finite(new, _device(b)) & _weighed(source, _device(b)) for b, source, new in zip(chosen, sources, measured, strict=True)]
        valid = self._reduce(chosen, sources, measured, flags)
        for i, (block, flag) in enumerate(zip(chosen, valid, strict=True)):
            block.merge(measured[i], flag)
            measured[i] = {}  # freed block by block: a second set of statistics is never held
        return {block.name: flag for block, flag in zip(chosen, valid, strict=True)}

    def _reduce(
        self, blocks: Sequence[BlockState], sources: Sequence[Observation | Measured], measured: list[dict[str, Any]], flags: list[Tensor]
    ) -> list[Tensor]:
        """Weighted means over ranks in place; a rank with bad data contributes weight zero. Gradients are already reduced."""
        entries: list[tuple[int, str]] = []
        tensors: list[Tensor] = []
        weights: list[Tensor] = []
        for i, (block, observation, new, flag) in enumerate(zip(blocks, sources, measured, flags, strict=True)):
            weight = torch.where(flag, observation.weight.to(flag.device), 0.0)
            shared = not isinstance(observation, _REDUCED)
            weights.append(weight if shared else weight / self.group.size)
            for name, value in new.items():
                if block.spec[name].kind in ("mean", "state") and shared and self.group.several and not block.spec[name].whole:
                    entries.append((i, name))
                    tensors.append(torch.where(flag, value, torch.zeros_like(value)) * weight.to(value.dtype))
        sums = self.group.sum([*weights, *tensors])
        totals, reduced = sums[: len(weights)], sums[len(weights) :]
        for (i, name), value in zip(entries, reduced, strict=True):
            total = totals[i].to(value.dtype)
            measured[i][name] = value / torch.where(total == 0, torch.ones_like(total), total)
        if self.group.several:
            self._concatenate(blocks, sources, measured, flags, [w / torch.where(t == 0, 1.0, t) for w, t in zip(weights, totals, strict=True)])
        if self.given:
            for block, observation, new, total in zip(blocks, sources, measured, totals, strict=True):
                if _depends_on_loss(observation):
                    self._scale_given(block, new, total / (self.amp_scale * self.group.size))
        return [total > 0 if self.group.several else flag for total, flag in zip(totals, flags, strict=True)]

    def _concatenate(
        self, blocks: Sequence[BlockState], sources: Sequence[Observation | Measured], measured: list[dict[str, Any]], flags: list[Tensor],
        shares: list[Tensor],
    ) -> None:  # fmt: skip
        """The rows of all ranks in place, each with its rank's share of the weight; those of a rank with bad data are zeros."""
        entries: dict[str, tuple[int, str]] = {}
        rows: dict[str, Tensor] = {}
        for i, (block, source, new, flag, share) in enumerate(zip(blocks, sources, measured, flags, shares, strict=True)):
            if isinstance(source, _REDUCED):
                continue
            for name, value in new.items():
                if block.spec[name].kind == "rows" and not block.spec[name].whole:
                    entries[f"{block.name}: {name}"] = (i, name)
                    rows[f"{block.name}: {name}"] = torch.where(flag, value, 0.0) * block.spec[name].scale(share).to(value.dtype)
        for key, value in self.group.concatenate(rows).items():
            i, name = entries[key]
            measured[i][name] = value

    @staticmethod
    def _scale_given(block: BlockState, new: dict[str, Any], total: Tensor) -> None:
        for name, stat in block.spec.items():
            if name in new and stat.kind != "local" and not stat.whole:
                new[name] = new[name] * stat.scale(total).to(new[name].dtype)


def _depends_on_loss(observation: Observation | Measured) -> bool:
    """Moments of inputs alone do not, and the weights of the loss are in the gradient of the step already."""
    if isinstance(observation, Factors):
        return observation.outputs is not None
    return isinstance(observation, (Columns, Measured, Moved, Product))


def _observed(block: BlockState, observation: Observation | Measured) -> bool:
    """A block that was planned after the columns were reduced has to wait for the next observation."""
    return not isinstance(observation, Measured) or block.name in observation.blocks


def _weighed(observation: Observation | Measured, device: torch.device) -> Tensor:
    """Whether the weights of the parts have a sum that can be divided by."""
    return (observation.weight.isfinite() & (observation.weight != 0)).to(device)


def _measure(block: BlockState, stage: str, observation: Observation | Measured) -> dict[str, Any]:
    if isinstance(observation, Measured):
        return observation.blocks.pop(block.name)  # taken out once: what it holds is then the history's
    return block.plan.repr.measure(stage, observation, block.plan.block, block.statistics)


def _device(block: BlockState) -> torch.device:
    owner = next(iter(block.plan.block.layers.values()))
    return next(owner.module.parameters()).device
