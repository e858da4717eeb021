"""One column at a time, handed over on its way back: what is held of it is a layer's, not the network's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from precond.observe.guard import own_pass
from precond.observe.hooks import Handles
from precond.observe.passes import Take
from precond.observe.records import CriterionCall

Slot = tuple[int, int]
"""(call of a layer, output of it)."""


@contextmanager
def streamed(call: CriterionCall, groups: Sequence[frozenset[str]], take: Take) -> Iterator[Callable[[Tensor], None]]:
    """A function that sends one cotangent (1, *output.shape) back, and hands over the columns of a group as soon as it has them all.

    Hooks on the nodes of the graph see a column pass; torch captures it only where nothing further back is asked for, as
    what it captures lives until the end of the pass.
    """
    stream = _Stream(call, groups, take)
    try:
        yield stream.send
    finally:
        stream.handles.remove()


class _Stream:
    def __init__(self, call: CriterionCall, groups: Sequence[frozenset[str]], take: Take) -> None:
        self.call, self.groups, self.take = call, groups, take
        self.calls = call.forward.calls
        self.group = {i: g for g, layers in enumerate(groups) for i, c in enumerate(self.calls) if c.name in layers}
        edges = {(i, j): e for i in self.group for j, e in enumerate(self.calls[i].resolve(call.nodes)) if e is not None}
        last = _without_targets_behind(call.output.grad_fn, {edge.node for edge in edges.values()})
        self.captured = {slot: edge for slot, edge in edges.items() if edge.node in last}
        self.handles = Handles()
        for slot, edge in edges.items():
            if slot not in self.captured:
                self.handles.add(edge.node.register_prehook(self._hook(slot, edge.output_nr)))
        self.expected = [{slot for slot in edges if self.group[slot[0]] == g} for g in range(len(groups))]
        self.seen: dict[Slot, Tensor] = {}
        self.waiting: list[set[Slot]] = []

    def send(self, cotangents: Tensor) -> None:
        self.seen, self.waiting = {}, [set(slots) for slots in self.expected]
        if self.captured:
            with own_pass():
                found = torch.autograd.grad(
                    [self.call.output], list(self.captured.values()), [cotangents[0].to(self.call.output.dtype)], retain_graph=True,
                    allow_unused=True,
                )  # fmt: skip
            for slot, grad in zip(self.captured, found, strict=True):
                self._arrive(slot, grad)
        for g, waiting in enumerate(self.waiting):
            if waiting or not self.expected[g]:  # the rest of it was not reached
                self._hand_over(g)

    def _hook(self, slot: Slot, number: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        return lambda grads: self._arrive(slot, grads[number])

    def _arrive(self, slot: Slot, grad: Tensor | None) -> None:
        g = self.group[slot[0]]
        if grad is None:
            return
        self.seen[slot] = grad.detach().unsqueeze(0)
        self.waiting[g].discard(slot)
        if not self.waiting[g]:
            self._hand_over(g)

    def _hand_over(self, g: int) -> None:
        columns = []
        for i in (i for i, group in self.group.items() if group == g):
            grads = [self.seen.pop((i, j), None) for j in range(len(self.calls[i].edges))]
            columns.append(self.calls[i].columns(grads, self.call.forward.batch))
        self.take(self.groups[g], columns)


def _without_targets_behind(root: Any, targets: Iterable[Any]) -> set[Any]:
    """The targets among the nodes behind `root` from which no other target can be reached."""
    wanted, leads, last = set(targets), dict[Any, bool](), set[Any]()  # leads: whether a node is a target or leads to one
    stack = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if node in leads:
            continue
        behind = [n for n, _ in node.next_functions if n is not None]
        if not expanded:
            stack.append((node, True))
            stack.extend((n, False) for n in behind if n not in leads)
            continue
        further = any(leads[n] for n in behind)
        if node in wanted and not further:
            last.add(node)
        leads[node] = further or node in wanted
    return last
