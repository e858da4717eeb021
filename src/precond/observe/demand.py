"""What is asked of an observer: a matrix, the kind of observation, and the layers whose blocks need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.likelihoods import Likelihood
from precond.observe.observation import Kind, Part


@dataclass(frozen=True)
class Context:
    """What a matrix may look at to choose the cotangents it sends back from one criterion call."""

    likelihood: Likelihood
    output: Tensor
    target: Tensor
    examples: int
    generator: torch.Generator
    mixed: str | None = None
    """Why the terms of the output cannot be told apart by example, or None."""

    @property
    def batch(self) -> int:
        """The number of examples, for whoever takes the terms of the output to be theirs, one example after another."""
        if self.mixed is not None:
            raise ObservationError(self.mixed)
        return self.examples


class Source(Protocol):
    """What the observer asks of a matrix."""

    @property
    def true_gradient(self) -> bool: ...
    @property
    def sampled(self) -> bool: ...
    @property
    def chained(self) -> bool: ...

    def cotangents(self, context: Context) -> Tensor: ...

    def chunks(self, context: Context, limit: int) -> Iterator[Tensor]: ...


Reduced = dict[str, dict[str, Tensor]]
"""Statistics by block."""
Reduce = Callable[[Part], Reduced]


@dataclass(frozen=True)
class Demand:
    """One matrix, the kind of observation resolved for it, and the layers whose blocks need it.

    reduce: from some columns of one criterion call to statistics by block, which add over columns: one function for each
    group of layers that share no block with another. Where every block can, columns are reduced a few at a time in the
    loss hook and never held together.
    """

    matrix: Source
    kind: Kind
    layers: frozenset[str]
    params: Mapping[str, nn.Parameter] = field(default_factory=dict, compare=False)
    reduce: Mapping[frozenset[str], Reduce] | None = field(default=None, compare=False)

    @property
    def backward(self) -> bool:
        """Fed by the user's own backward pass."""
        return self.kind == "layer_secant" or (self.kind == "columns" and self.matrix.true_gradient)

    @property
    def slope(self) -> bool:
        """Fed by the gradient of each pass as it reaches the parameters, before anything that the loop does to p.grad."""
        return self.kind in ("secant", "successive")

    @property
    def replayed(self) -> bool:
        """Whether the forward pass will be run again."""
        return self.kind in ("product", "pairs", "secant", "layer_secant")

    @property
    def sampled(self) -> bool:
        """Fed by a nested pass down to the parameters, at drawn labels."""
        return self.kind in ("gradient", "whitening") and self.matrix.sampled

    @property
    def chained(self) -> bool:
        """Fed by a nested pass down to its last layer, and by what is between its layers."""
        return self.kind == "factors" and self.matrix.chained

    @property
    def nested(self) -> bool:
        """Fed by a nested pass in the loss hook."""
        return self.kind == "columns" and not self.matrix.true_gradient
