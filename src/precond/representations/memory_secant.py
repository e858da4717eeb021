"""What low-rank representations become where C is known by secant pairs: the last few of them, L-BFGS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Kind
from precond.operators import Operator, SecantMemory
from precond.representations.base import Representation, Statistics, zeros
from precond.representations.fitted import over_probes
from precond.representations.secant import DenseSecant, SuccessiveSecant
from precond.secant import PairRule
from precond.statistics import Stat


@dataclass(frozen=True, kw_only=True)
class MemorySecant(DenseSecant):
    """The last `memory` pairs that counted, damped when they came by the matrix that was there or its inverse, and the multiple of I it starts from.

    newest: that is y^T y / s^T y of the newest pair, else 1, or that of the first pair where the rule says so. Memory 2 memory P.
    """

    memory: int
    newest: bool

    @property
    def structure(self) -> type[Operator]:  # type: ignore[override]
        return SecantMemory

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return dict.fromkeys(("S", "Y", "initial", "s", "y", "pairs"), Stat("state"))

    def _start(self, block: Block) -> Statistics:
        return nothing(zeros(block, block.n), self.memory)

    def _follow(self, s: Tensor, y: Tensor, rule: PairRule, block: Block, statistics: Statistics) -> Statistics:
        return remember(s, y, rule, statistics or self._start(block), newest=self.newest)

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        return SecantMemory(statistics["S"], statistics["Y"], statistics["initial"])

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return 2 * (self.memory + 1) * block.n * itemsize


@dataclass(frozen=True, kw_only=True)
class SuccessiveMemory(SuccessiveSecant, MemorySecant):
    """The same from the gradients of successive steps."""


def nothing(s: Tensor, memory: int) -> Statistics:
    """What is kept where there is no pair yet; s: (n,), like one of its vectors."""
    none, zero = s.new_zeros(memory, len(s)), torch.zeros_like(s)
    pairs = torch.zeros((), dtype=torch.int64, device=s.device)
    return {"S": none, "Y": none, "initial": s.new_ones(()), "s": zero, "y": zero, "pairs": pairs}


def remember(s: Tensor, y: Tensor, rule: PairRule, start: Statistics, *, newest: bool) -> Statistics:
    """What is kept after one more pair: S and Y (m, n), oldest first, `initial`, the averages s and y, and the number of pairs that counted."""
    s, y = (rule.decay * start[name] + (1 - rule.decay) * v.to(start["s"].dtype) for name, v in (("s", s), ("y", y)))
    memory = SecantMemory(start["S"], start["Y"], start["initial"])
    step, change, counts = rule.damp(s, y, lambda v: memory @ v, lambda v: memory.unchecked_inverse() @ v)
    size = step.norm()
    size = torch.where(size > 0, size, 1.0)  # the length of a pair does not matter, and small ones underflow in their products

    def pushed(kept: Tensor, new: Tensor) -> Tensor:
        return torch.where(counts, torch.cat([kept[1:], new.unsqueeze(0) / size]), kept)

    initial, inner = start["initial"], change @ step
    if newest or rule.scale_initial:
        scales = counts & (newest | (start["pairs"] == 0))
        initial = torch.where(scales, change @ change / torch.where(inner == 0, 1.0, inner), initial)
    return {
        "S": pushed(start["S"], step), "Y": pushed(start["Y"], change), "initial": initial, "s": s, "y": y, "pairs": start["pairs"] + counts
    }  # fmt: skip


def over_memory(host: Representation, kind: Kind, memory: int, *, newest: bool) -> Representation:
    """The host where its kind of observation is a pair, itself otherwise."""
    if kind == "secant":
        return MemorySecant(host=host, memory=memory, newest=newest)
    return SuccessiveMemory(host=host, memory=memory, newest=newest) if kind == "successive" else over_probes(host, kind)
