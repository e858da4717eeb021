"""The observations of a step, by demand, over all ranks where they are sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from precond import numerics, observe
from precond.distributed import Group
from precond.observe import CriterionCall, Factors, Gradient, Moved, Observation, Observer, Pair, Product, Slope, Tensors, TermWeights
from precond.plan import Plan
from precond.reduction import Measured, Reduction


class Assembly:
    """The observations of one step, by demand, and `reduction`, which makes them the statistics of all ranks.

    loss_weights: "normalised" or "given", as `Reduction` reads them.
    """

    def __init__(self, plan: Plan, observer: Observer, group: Group, loss_weights: str, amp_scale: float) -> None:
        self.plan, self.observer, self.group = plan, observer, group
        self.reduction = Reduction(group, loss_weights == "given", amp_scale)

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
        factor = self.reduction.factor(weight)
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
        share = self.reduction.factor(weights.total)
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
        factor = self.reduction.factor(observe.weight(self.observer))
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
        factor = self.reduction.factor(product.weight)

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
