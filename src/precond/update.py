"""From the observations of a step to refreshed blocks: measure, reduce over ranks, merge, refresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from precond import numerics, observe
from precond.blockstate import BlockState, finite
from precond.distributed import Group
from precond.observe import Columns, CriterionCall, Gradient, Observation, Observer, Product, Tensors
from precond.plan import Plan

Weight = Mapping[int, Tensor]


class Assembly:
    """The observations of one step, by demand.

    loss_weights: "normalised" divides by the sum of the weights over parts and ranks; "given" multiplies a statistic of
    degree d by (sum of weights)^d, and divides the sum by AMP's scale.
    """

    def __init__(self, plan: Plan, observer: Observer, group: Group, loss_weights: str, amp_scale: float) -> None:
        self.plan, self.observer, self.group = plan, observer, group
        self.given, self.amp_scale = loss_weights == "given", amp_scale

    def observations(self, gradients: Tensors) -> list[Observation | Measured]:
        return [self._one(number, gradients) for number in range(len(self.plan.demands))]

    def _one(self, number: int, gradients: Tensors) -> Observation | Measured:
        demand = self.plan.demands[number]
        matrix: Any = demand.matrix
        if demand.sampled:
            return self._sampled(number)
        if demand.kind == "gradient":
            return Gradient(gradients)
        if demand.kind == "columns" and (early := observe.reduced(self.observer, number)) is not None:
            return Measured(*early)
        if demand.kind == "columns":
            return replace(observe.columns(self.observer, number), centred=matrix.centred)
        if demand.kind == "factors":
            return observe.factors(self.observer, number)
        return self._product(number)

    def _sampled(self, number: int) -> Gradient:
        """sqrt(N) g at drawn labels over all ranks, N = sum c_i / sum c_i^2 with c_i the weights of the terms."""
        values, first, second, weight = observe.sampled_gradient(self.observer, number)
        share = self._factor(weight)
        summed = self.group.sum([first * share, second * share.square(), *(v * share.to(v.dtype) for v in values.values())])
        root = (summed[0] / summed[1]).sqrt()
        return Gradient(dict(zip(values, (v * root.to(v.dtype) for v in summed[2:]), strict=True)))

    def _product(self, number: int) -> Product:
        demand, tensors = self.plan.demands[number], self.plan.partition.tensors
        names = {p.name for plan in self.plan.blocks if plan.demand == number for p in plan.block.parameters}
        params = {n: p for n, p in tensors.items() if n in names}
        matrix: Any = demand.matrix

        def curvature(part: CriterionCall) -> Any:
            if matrix.second_order:
                return None
            context = self.observer.context(part, number)
            frozen = matrix.frozen(context)
            return lambda output, vector: matrix.output_product(context, frozen, vector)

        product, mean = observe.product(self.observer, number, params, curvature)
        factor = self._factor(product.weight)

        def over_ranks(local: Tensors) -> Tensors:
            return dict(zip(local, self.group.sum([v * factor.to(v.dtype) for v in local.values()]), strict=True))

        if not matrix.centred:
            return Product(product.local, product.weight, lambda vectors: over_ranks(product.local(vectors)))
        values, count = mean()
        first, total = over_ranks(values), self.group.sum([count * factor])[0]

        def centred(vectors: Tensors) -> Tensors:
            inner = torch.stack([(first[n] * v).flatten(1).sum(1) for n, v in vectors.items()]).sum(0)
            out = over_ranks(product.local(vectors))
            return {n: v - first[n] * (inner / total.to(v.dtype)).view(-1, *[1] * (v.dim() - 1)) for n, v in out.items()}

        return Product(product.local, product.weight, centred)

    def _factor(self, weight: Tensor) -> Tensor:
        """What this rank's normalised product is multiplied by before the sum over ranks."""
        if self.given:
            return weight / (self.amp_scale * self.group.size)
        return weight / self.group.sum([weight])[0]

    def merge(self, blocks: Sequence[BlockState], observations: Sequence[Observation | Measured], stage: str) -> list[Tensor]:
        """Measure one stage of every block, sum over ranks by kind, and merge; returns a valid flag for each block."""
        chosen = [b for b in blocks if stage in b.plan.repr.stages and _observed(b, observations[b.plan.demand])]
        if not chosen:
            return []
        with numerics.full_precision(_device(chosen[0]).type):
            measured = [_measure(b, stage, observations[b.plan.demand]) for b in chosen]
        flags = [finite(new, _device(block)) for block, new in zip(chosen, measured, strict=True)]
        valid = self._reduce(chosen, observations, measured, flags)
        for block, new, flag in zip(chosen, measured, valid, strict=True):
            block.merge(new, flag)
        return valid

    def _reduce(
        self, blocks: Sequence[BlockState], observations: Sequence[Observation | Measured], measured: list[dict[str, Any]], flags: list[Tensor]
    ) -> list[Tensor]:
        """Weighted means over ranks in place; a rank with bad data contributes weight zero. Gradients are already reduced."""
        entries: list[tuple[int, str]] = []
        tensors: list[Tensor] = []
        weights: list[Tensor] = []
        for i, (block, new, flag) in enumerate(zip(blocks, measured, flags, strict=True)):
            observation = observations[block.plan.demand]
            weight = torch.where(flag, observation.weight.to(flag.device), 0.0)
            shared = not isinstance(observation, Gradient)
            weights.append(weight if shared else weight / self.group.size)
            for name, value in new.items():
                if block.spec[name].kind == "mean" and shared and self.group.several:
                    entries.append((i, name))
                    tensors.append(torch.where(flag, value, torch.zeros_like(value)) * weight.to(value.dtype))
        sums = self.group.sum([*weights, *tensors])
        totals, reduced = sums[: len(weights)], sums[len(weights) :]
        for (i, name), value in zip(entries, reduced, strict=True):
            total = totals[i].to(value.dtype)
            measured[i][name] = value / torch.where(total == 0, torch.ones_like(total), total)
        if self.given:
            for block, new, total in zip(blocks, measured, totals, strict=True):
                if isinstance(observations[block.plan.demand], (Columns, Measured, Product)):  # moments of inputs have degree 0
                    self._scale_given(block, new, total / (self.amp_scale * self.group.size))
        return [total > 0 if self.group.several else flag for total, flag in zip(totals, flags, strict=True)]

    @staticmethod
    def _scale_given(block: BlockState, new: dict[str, Any], total: Tensor) -> None:
        for name, stat in block.spec.items():
            if name in new and stat.kind != "local":
                new[name] = new[name] * (total**stat.degree).to(new[name].dtype)


@dataclass(frozen=True)
class Measured:
    """Columns that were reduced in the loss hook: statistics by block."""

    blocks: Mapping[str, dict[str, Tensor]]
    weight: Tensor


def _observed(block: BlockState, observation: Observation | Measured) -> bool:
    """A block that was planned after the columns were reduced has to wait for the next observation."""
    return not isinstance(observation, Measured) or block.name in observation.blocks


def _measure(block: BlockState, stage: str, observation: Observation | Measured) -> dict[str, Any]:
    if isinstance(observation, Measured):
        return dict(observation.blocks[block.name])
    return block.plan.repr.measure(stage, observation, block.plan.block, block.statistics)


def _device(block: BlockState) -> torch.device:
    owner = next(iter(block.plan.block.layers.values()))
    return next(owner.module.parameters()).device
