"""Observations: what a matrix gives to a representation. These few kinds, and nothing else, cross that border."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from precond.observe.trees import tensors_in

Kind = Literal["columns", "gradient", "product", "factors"]
Tensors = dict[str, Tensor]


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
    once: dict[str, Any] = field(default_factory=dict, compare=False)
    """What depends on the inputs alone, kept while the columns of one call come a few at a time."""

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

    share: 0-dim, the weights of the parts divided by their sum. scale: 0-dim, 1 / terms for a mean, 1 for a sum.
    """

    share: Tensor
    scale: Tensor
    batch: int
    layers: Mapping[str, tuple[LayerColumns, ...]]


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
    """The inputs of the layers alone: C = I (x) A for each, A the mean over rows of a a^T."""

    parts: tuple[Part, ...]
    weight: Tensor


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


Observation = Columns | Gradient | Product | Factors
