"""Observations: what a matrix gives to a representation. These few kinds, and nothing else, cross that border."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from precond.observe.trees import tensors_in
from precond.secant import PairRule

Kind = Literal["columns", "gradient", "product", "factors", "secant", "successive", "layer_secant", "pairs", "whitening"]
Distribution = Literal["rademacher", "normal"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Drawn:
    """Of a call that drew random numbers: the generators' states before it, by device type, and the output that came of them."""

    states: Mapping[str, Tensor]
    output: Tensor


@dataclass(frozen=True)
class LayerColumns:
    """One call of one layer: what went in, and K columns of what came back at its outputs.

    args, kwargs: the detached inputs of the call. grads: for every tensor output (K, *output.shape), per term and
    unscaled, or None where nothing came back. `rows` says how the leading dimension enumerates the examples.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grads: tuple[Tensor | None, ...]
    training: bool
    batch: int
    rows: str | None = None
    drawn: Drawn | None = None

    @property
    def input(self) -> Tensor:
        """The first tensor the layer was called with."""
        return next(tensors_in((self.args, dict(self.kwargs))))

    @property
    def grad(self) -> Tensor | None:
        """The columns at the layer's first (usually only) output."""
        return self.grads[0] if self.grads else None


@dataclass(frozen=True)
class Part:
    """One differentiated criterion call: sum over terms times `scale` is its matrix, `share` its weight in the step.

    share: 0-dim, the weights of the parts divided by their sum. scale: 0-dim, 1 / terms for a mean, 1 for a sum. first: False
    for further columns of a call that come a few at a time, whose inputs have been counted.
    """

    share: Tensor
    scale: Tensor
    batch: int
    layers: Mapping[str, tuple[LayerColumns, ...]]
    first: bool = True


@dataclass(frozen=True)
class Columns:
    """C = sum_parts share * scale * sum_{ik} u_ik u_ik^T, u_ik = sum over positions of g_ik a_i^T of example i.

    centred: less the outer product of the mean, which a representation takes off after averaging.
    """

    parts: tuple[Part, ...]
    weight: Tensor
    centred: bool = False


@dataclass(frozen=True)
class Factors:
    """Moments of the inputs and outputs of layers: C = B (x) A for each, A the mean over rows of a a^T.

    outputs: by layer the moment of the gradient at all the output of one example, (*out, *out) in its own layout, scale folded in and
    already summed over parts and ranks; B is made of it. None: B is the identity, and nothing depends on the loss.
    """

    parts: tuple[Part, ...]
    weight: Tensor
    outputs: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Gradient:
    """One mean gradient of the step by parameter: C = g g^T. It is already summed over parts and ranks."""

    values: Tensors
    weight: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))


@dataclass(frozen=True)
class Product:
    """A live v -> C v, for one step. `local` is this rank's share, divided by the sum of its weights.

    Vectors are given and returned by parameter name with one leading dimension of K right-hand sides; v is zero on
    the parameters that are not given, and only those parameters are returned: that is a diagonal block of C.
    """

    local: Callable[[Tensors], Tensors]
    weight: Tensor
    whole: Callable[[Tensors], Tensors] | None = None

    def __call__(self, vectors: Tensors) -> Tensors:
        """C v, over all ranks where there are several."""
        return self.local(vectors) if self.whole is None else self.whole(vectors)


@dataclass(frozen=True)
class Probes:
    """Pairs (v, h), v drawn over all the parameters of a demand: h = C v, or the gradient of the step, to which v is then noise.

    draw(distribution, samples): v and h by parameter, with one leading dimension of samples; drawn once a step for all who ask, equal
    on all ranks, and already summed over parts and ranks.
    """

    draw: Callable[[Distribution, int], tuple[Tensors, Tensors]]
    weight: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))


@dataclass(frozen=True)
class Pair:
    """A step s and the change y of the gradient of one batch along it, already summed over parts and ranks.

    By parameter; by layer, in the space of its outputs, where the user gives such pairs himself.
    """

    s: Tensors
    y: Tensors
    rule: PairRule
    weight: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))


@dataclass(frozen=True)
class Slope:
    """Where the parameters are and the gradient there, already summed over parts and ranks; two of them make a pair."""

    point: Tensors
    gradient: Tensors
    rule: PairRule
    weight: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))


@dataclass(frozen=True)
class Moved:
    """The true columns of the step's batch at the parameters after the update."""

    columns: Columns
    rule: PairRule

    @property
    def weight(self) -> Tensor:
        """That of the columns."""
        return self.columns.weight


Observation = Columns | Gradient | Product | Factors | Probes | Pair | Slope | Moved
