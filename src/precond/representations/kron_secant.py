"""What `kron_io` becomes where C is known by secant pairs in the space of a layer's outputs: K-BFGS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Factors, Moved, Observation, Pair, Part
from precond.operators import Operator, Probed, Secant, SecantKronecker, SecantMemory
from precond.representations.base import Representation, Statistics, refuse_kind, zeros
from precond.representations.hosted import Hosted
from precond.representations.inputs import input_rows
from precond.representations.memory_secant import nothing, remember
from precond.secant import PairRule
from precond.statistics import Stat


@dataclass(frozen=True, kw_only=True)
class KronSecant(Hosted):
    """C_l ~ B (x) A: A the second moment of the inputs, B made by pairs of mean outputs and mean output gradients.

    s is the change of the mean over rows of W a, y that of scale * sum over rows of g, from the parameters before the
    update to those after it, on the same batch. A solver that learns an inverse along directions is given the mean input of the batch for A
    and (s, y) for B, both after the update, as published.

    memory: None for a dense B, or of how many pairs B is made, from I: K-BFGS(L).

    Source: Goldfarb, Ren & Bahamou, "Practical quasi-Newton methods for training deep neural networks", 2020.
    """

    requests = ("layer_secant",)
    structure = SecantKronecker
    stages = ("inputs",)
    after = ("moved", "pair")

    host: Representation
    memory: int | None = None

    def hosts(self, block: Block) -> str | None:
        owner = next(iter(block.layers.values()))
        alone = owner.rule.joint and not owner.rule.packed
        if alone and self.memory and _groups(block) > 1:
            return "it has one output factor a group, which are held as matrices, memory=None, and not as pairs"
        return self.host.hosts(block) or (None if alone else "its weight is stored input first, or is several matrices in one")

    def fallback(self, block: Block) -> str:
        return self.host.fallback(block)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        inputs = {name: stat for name, stat in self.host.statistics(block).items() if name != "B"}
        sums = dict.fromkeys(("count", "input", "output", "slope", "moved_output", "moved_slope"), Stat("state"))
        return inputs | sums | dict.fromkeys((*self._kept, "fresh"), Stat("state", degree=0, whole=True))  # of sums that are summed over ranks

    @property
    def _kept(self) -> tuple[str, ...]:
        """The entries that stand for B, from step to step."""
        return (*(("S", "Y", "initial") if self.memory else ("B",)), "s", "y", "pairs")

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if isinstance(observation, Columns):
            inputs = self.host.measure("all", Factors(observation.parts, observation.weight), block, {})
            count, total, output, slope = self._sums(observation, block)
            start = {name: statistics[name] for name in self._kept} if statistics else self._start(output)
            sums = {"count": count, "input": total, "output": output, "slope": slope, "moved_output": output, "moved_slope": slope}
            return {"A": inputs["A"], "rows": inputs["rows"]} | sums | start | {"fresh": torch.zeros_like(count)}
        if isinstance(observation, Moved) and stage == "moved":
            _, _, output, slope = self._sums(observation.columns, block)
            return {"moved_output": output, "moved_slope": slope}
        if isinstance(observation, Moved):
            count = torch.where(statistics["count"] > 0, statistics["count"], 1.0)
            step = (statistics["moved_output"] - statistics["output"]) / count
            return self._follow(step, statistics["moved_slope"] - statistics["slope"], observation.rule, statistics)
        if isinstance(observation, Pair):
            s, y = (v[block.name].to(statistics["s"].dtype).view_as(statistics["s"]) for v in (observation.s, observation.y))
            return self._follow(s, y, observation.rule, statistics)
        raise refuse_kind(self, observation)

    def _follow(self, s: Tensor, y: Tensor, rule: PairRule, statistics: Statistics) -> Statistics:
        fresh = {"fresh": torch.ones_like(statistics["fresh"])}
        if self.memory:
            return remember(s, y, rule, statistics, newest=False) | fresh
        s, y = (rule.decay * statistics[name] + (1 - rule.decay) * v for name, v in (("s", s), ("y", y)))
        B, counts = rule.direct(statistics["B"], s, y, statistics["pairs"] == 0)
        return {"B": B, "s": s, "y": y, "pairs": statistics["pairs"] + counts} | fresh

    def _start(self, output: Tensor) -> Statistics:
        if self.memory:
            return nothing(output, self.memory)
        eye = torch.eye(output.shape[-1], dtype=output.dtype, device=output.device).expand(*output.shape, output.shape[-1]).clone()
        pairs = torch.zeros(output.shape[:-1], dtype=torch.int64, device=output.device)
        return {"B": eye, "s": torch.zeros_like(output), "y": torch.zeros_like(output), "pairs": pairs}

    def _sums(self, columns: Columns, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows, sum of a, W times it, sum of g), weighted, by group where there are groups."""
        groups, rows, width = _groups(block), *block.shape
        count, total, slope = zeros(block), zeros(block, groups, width), zeros(block, groups, rows // groups)
        for part in columns.parts:
            number, inputs = _inputs(part, block)
            weight = part.share * part.scale
            count, total = count + number * weight.to(count.dtype), total + inputs * weight.to(total.dtype)
            for layer, seen in block.calls(part):
                slope = slope + layer.rule.outputs(seen).sum((0, 2, 3)) * weight.to(slope.dtype)
        table = block.gather({n: layer.tensor(local).detach() for layer in block.layers.values() for local, n in layer.parameters.items()})
        output = (table.view(groups, rows // groups, width).to(total.dtype) @ total.unsqueeze(-1)).squeeze(-1)
        return (count, total, output, slope) if groups > 1 else (count, total[0], output[0], slope[0])

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        rows, count, fresh = statistics["rows"], statistics["count"], statistics["fresh"]
        A = statistics["A"] / torch.where(rows > 0, rows, torch.ones_like(rows))
        probe = fresh * statistics["input"] / torch.where(count > 0, count, torch.ones_like(count))
        if self.memory:
            B: Operator = SecantMemory(statistics["S"], statistics["Y"], statistics["initial"])
        else:
            B = Secant(statistics["B"], fresh * statistics["s"], fresh * statistics["y"])
        return SecantKronecker(B, Probed(A, probe))

    def bytes_held(self, block: Block, itemsize: int) -> int:
        groups, rows, width = _groups(block), *block.shape
        out = rows // groups
        return groups * (width * (width + 1) + out * (6 + (2 * self.memory if self.memory else out))) * itemsize


def _groups(block: Block) -> int:
    layer = next(iter(block.layers.values()))
    return layer.rule.groups(layer.module)


def _inputs(part: Part, block: Block) -> tuple[int, Tensor | float]:
    """(rows, sum over them of a (G, in')) over the calls of one part."""
    rows = [a for a in input_rows(part, block) if isinstance(a, Tensor)]
    if not rows:
        return 0, 0.0
    return sum(a.shape[1] * a.shape[2] for a in rows), torch.stack([a.sum((1, 2)) for a in rows]).sum(0)
