"""Layer rules: from one layer's (a, g) to gradients by example, by column, and to the rows a Kronecker factor is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.observe import LayerColumns, Tensors

ROW_LAYOUTS = ("flattened", "second")


@dataclass(frozen=True)
class OneHot:
    """Rows that are unit vectors, by index: (N, R) indices into `size`; `mask` is False where a row counts as zero."""

    index: Tensor
    size: int
    mask: Tensor


@dataclass(frozen=True)
class Rows:
    """The normal form of a layer whose gradient is a matrix product: dW = sum over rows of g a^T, in each of G groups.

    a: (G, N, R, in), or OneHot; without the homogeneous 1. g: (K, G, N, R, out). N examples with R shared positions.
    `input_first`: the weight is stored (in, out), so that its rows are inputs (Embedding).
    """

    a: Tensor | OneHot
    g: Tensor
    input_first: bool = False


class Rule(ABC):
    """What the library knows of one family of layers.

    `joint`: row o of the weight and entry o of the bias belong to one output unit, so [W, b] is one matrix.
    `elementwise`: weight and bias scale and shift single coordinates (normalisation layers); a unit is a 2 x 2 block.
    """

    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    joint: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    @abstractmethod
    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        """Gradients of the layer's parameters `names` by column and example: (K, n, *param.shape) for the n examples."""

    def inputs(self, seen: LayerColumns) -> Tensor | OneHot:
        """A of the normal form, (G, N, R, in); only where `linear` is True."""
        raise NotImplementedError(f"the rule {type(self).__name__} is not linear.")

    def outputs(self, seen: LayerColumns) -> Tensor:
        """G of the normal form, (K, G, N, R, out); only where `linear` is True."""
        raise NotImplementedError(f"the rule {type(self).__name__} is not linear.")

    def rows(self, seen: LayerColumns) -> Rows:
        """The normal form; only where `linear` is True."""
        return Rows(self.inputs(seen), self.outputs(seen), input_first=not self.joint)

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        """The gradient summed over examples and columns."""
        return {n: g.sum((0, 1)) for n, g in self.gradients(seen, names, slice(None)).items()}

    def refuse(self, module: nn.Module) -> str | None:
        """Why the rule would be silently wrong for this module, or None."""
        return None


_RULES: dict[type[nn.Module], Rule] = {}


def rule_for(*modules: type[nn.Module]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: use the rule for these module classes (and subclasses that keep their `forward`)."""

    def decorate(cls: type[Rule]) -> type[Rule]:
        cls.modules = modules
        rule = cls()
        for module in modules:
            _RULES[module] = rule
        return cls

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of the nearest known base class whose `forward` the module still runs; None: the generic rule."""
    for base in type(module).__mro__:
        if base in _RULES:
            return _RULES[base] if getattr(type(module), "forward", None) is getattr(base, "forward", None) else None
    return None


def wide(tensor: Tensor) -> Tensor:
    """At least float32: products of half-precision factors lose the small eigenvalues that damping is compared with."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def arrange(tensor: Tensor, seen: LayerColumns, columns: int = 0) -> Tensor:
    """Put the examples first. `columns`: leading dimensions before the layout starts (1 for g)."""
    if seen.rows == "second":
        return tensor.movedim(columns + 1, columns)
    if seen.rows == "flattened":
        shape = tensor.shape
        return tensor.reshape(*shape[:columns], seen.batch, -1, *shape[columns + 1 :])
    return tensor


def layer_input(seen: LayerColumns) -> Tensor:
    """The layer's input with examples first, in at least float32."""
    return arrange(wide(seen.input), seen)


def layer_grad(seen: LayerColumns) -> Tensor:
    """The columns at the layer's output, (K, N, ...), in at least float32."""
    grad = seen.grad
    assert grad is not None, "calls without columns are dropped when an observation is assembled"
    return arrange(wide(grad), seen, columns=1)


def check_examples(seen: LayerColumns, leading: int) -> None:
    """Refuse per-example quantities of a layer whose leading dimension is not the batch: they would be silently wrong."""
    if leading != seen.batch:
        raise ObservationError(
            f"layer {seen.name!r} has {leading} leading rows for a batch of {seen.batch} examples, so its rows cannot be told apart by example. "
            f"Say how it enumerates them, rows={{{seen.name!r}: 'flattened'}} (batch and positions flattened together) or 'second' (the batch "
            "is the second dimension), or use a representation that needs no examples: 'kron_io' with sharing='expand'."
        )
