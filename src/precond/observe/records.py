"""What is remembered of a forward pass until its backward pass and its step are over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from precond.errors import ObservationError
from precond.likelihoods import Likelihood
from precond.observe.bridge import Bridge
from precond.observe.chain import ChainSums
from precond.observe.observation import Drawn, LayerColumns
from precond.observe.trees import versions


@dataclass
class Clock:
    """Which backward pass is running (None between passes). Shared with tensor hooks, which must not hold an observer."""

    backward: int | None = None


@dataclass
class Call:
    """One call of one layer, with the gradient edges of its outputs.

    Edges, not tensors: after an in-place activation a gradient with respect to the output *tensor* is taken at the
    wrong place, silently. An edge that ends at the model's own output is kept as that output's number, since the
    output's node holds this record and would be kept alive by it.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    training: bool
    rows: str | None
    edges: list[GradientEdge | int | None]
    edge_numbers: list[int]
    slots: list[list[tuple[int, Tensor]]]
    versions: tuple[int, ...]
    size: int = 0  # numbers in its outputs
    drawn: Drawn | None = None

    def resolve(self, nodes: Mapping[int, Any]) -> list[GradientEdge | None]:
        """The edges, with those at the model's output taken from the nodes found by walking back from the criterion."""
        return [
            GradientEdge(nodes[edge], number) if isinstance(edge, int) and edge in nodes else None if isinstance(edge, int) else edge
            for edge, number in zip(self.edges, self.edge_numbers, strict=True)
        ]

    def columns(self, grads: list[Tensor | None], batch: int) -> LayerColumns:
        """This call with K columns at its outputs."""
        if versions((self.args, dict(self.kwargs))) != self.versions:
            raise ObservationError(
                f"the input of layer {self.name!r} was changed in place after the layer read it, so its curvature would be wrong: "
                f"clone it first, or leave the layer out with overrides={{{self.name!r}: None}}."
            )
        return LayerColumns(self.name, self.module, self.args, self.kwargs, tuple(grads), self.training, batch, self.rows, self.drawn)


@dataclass
class Forward:
    """One forward pass of the model: its arguments as they were, and the calls of its layers."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: int
    versions: tuple[int, ...]
    rng: dict[str, Tensor]
    autocast: tuple[str, bool, torch.dtype]
    buffers: dict[str, Tensor] = field(default_factory=dict)  # as they were before the pass, of those that it wrote to
    calls: list[Call] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)  # of its outputs
    outputs: list[Tensor] = field(default_factory=list)  # detached; only where products will run the pass again
    differentiated: bool = False  # a loss of this pass is part of a step
    without_grad: bool = False  # a layer ran with gradients off: perhaps inside a reentrant checkpoint


@dataclass
class CriterionCall:
    """One call of a criterion on an output of a recorded forward pass."""

    forward: Forward
    nodes: dict[int, Any]
    criterion: nn.Module | None
    likelihood: Likelihood
    output: Tensor
    target: Tensor
    model_output: int
    step: int
    index: int
    weight: Tensor | None = None
    backward: int = -1
    columns: dict[int, list[LayerColumns]] = field(default_factory=dict)
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    reduced: dict[int, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    chained: dict[int, ChainSums] = field(default_factory=dict)
    scale: Tensor | None = None
    bridge: Bridge | None = None
    factor: Tensor | None = None  # a weight that the model put on the loss itself

    def mixed(self) -> str | None:
        """Why the terms of the criterion's input are not one example's after another's, or None: the batch is not in front of an output."""
        batch, given, made = self.forward.batch, self.output.shape, self.forward.shapes[self.model_output]
        behind = batch in given[1:] if len(given) > 2 else made[:1] not in (given[:1], (batch,)) and batch in made[1:]
        if batch == 1 or not len(given) or given[0] == batch or not behind:
            return None
        return (
            f"the criterion's input has shape {tuple(given)} and the model's output {tuple(made)} for a batch of {batch} examples, which is not in front: "
            "its terms would be taken for those of other examples. Transpose output and target, so that the batch is their leading dimension, "
            "before the criterion, or before they are flattened for it."
        )
