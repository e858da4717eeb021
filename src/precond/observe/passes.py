"""Nested passes: columns from the model's output to the layers, without the gradient of any weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from precond.observe.guard import own_pass
from precond.observe.observation import LayerColumns
from precond.observe.records import CriterionCall


def batched_grad(
    outputs: Sequence[Tensor], inputs: Sequence[Any], cotangents: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients for K cotangents at once: cotangents (K, *output.shape) in, (K, *input.shape) out, None where unreached.

    One pass under vmap where every operation on the way allows it, else K passes.
    """
    columns = cotangents[0].shape[0]

    def grad(cotangents: Sequence[Tensor], batched: bool) -> list[Tensor | None]:
        with own_pass():
            got = torch.autograd.grad(
                list(outputs), list(inputs), list(cotangents), retain_graph=True, create_graph=create_graph,
                allow_unused=True, is_grads_batched=batched,
            )  # fmt: skip
        return list(got)

    if columns > 1:
        try:
            return grad(cotangents, batched=True)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
    passes = [grad([c[k] for c in cotangents], batched=False) for k in range(columns)]
    return [None if tensors[0] is None else torch.stack([t for t in tensors if t is not None]) for tensors in zip(*passes, strict=True)]


def nested_columns(call: CriterionCall, cotangents: Tensor, layers: frozenset[str]) -> list[LayerColumns]:
    """Send (K, *output.shape) cotangents back from the criterion's input to the outputs of the named layers."""
    edges: list[GradientEdge] = []
    owners: list[tuple[int, int]] = []
    calls = [c for c in call.forward.calls if c.name in layers]
    for i, layer_call in enumerate(calls):
        for j, edge in enumerate(layer_call.resolve(call.nodes)):
            if edge is not None:
                edges.append(edge)
                owners.append((i, j))
    grads: list[list[Tensor | None]] = [[None] * len(c.edges) for c in calls]
    if edges:
        found = batched_grad([call.output], edges, [cotangents.to(call.output.dtype)])
        for (i, j), grad in zip(owners, found, strict=True):
            grads[i][j] = None if grad is None else grad.detach()
    return [c.columns(g, call.forward.batch) for c, g in zip(calls, grads, strict=True)]


Take = Callable[[frozenset[str], Sequence[LayerColumns]], None]
"""What is done with the columns of a group of layers."""


def grouped(call: CriterionCall, groups: Sequence[frozenset[str]], take: Take, cotangents: Tensor) -> None:
    """Send (K, *output.shape) cotangents back in one pass, and hand the columns over group by group."""
    found = nested_columns(call, cotangents, frozenset().union(*groups))
    for layers in groups:
        mine = [seen for seen in found if seen.name in layers]
        found = [seen for seen in found if seen.name not in layers]
        take(layers, mine)
