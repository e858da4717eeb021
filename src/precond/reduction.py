"""From the observations of a step to merged statistics: measure block by block, reduce over ranks, merge into the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond import numerics
from precond.blockstate import BlockState, finite
from precond.distributed import Group
from precond.observe import Columns, Factors, Gradient, Moved, Observation, Pair, Probes, Product, Slope


@dataclass(frozen=True)
class Measured:
    """Columns that were reduced in the loss hook: statistics by block, each taken out once."""

    blocks: dict[str, dict[str, Tensor]]
    weight: Tensor


_REDUCED = (Gradient, Pair, Probes, Slope)  # what is the same on all ranks already
Observations = Sequence[Observation | Measured] | Mapping[int, Observation]
"""By demand."""


@dataclass(frozen=True)
class Reduction:
    """Weighted means over parts and ranks.

    given: False divides by the sum of the weights over parts and ranks; True multiplies a statistic of degree d by
    (sum of weights)^d, and divides the sum by AMP's scale.
    """

    group: Group
    given: bool
    amp_scale: float

    def factor(self, weight: Tensor) -> Tensor:
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
