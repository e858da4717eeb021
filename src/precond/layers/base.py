"""Layer rules: from one layer's (a, g) to gradients by example, by column, and to the rows a Kronecker factor is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.observe import LayerColumns, Tensors

ROW_LAYOUTS = ("flattened", "second")
ROWS_AT_ONCE = 1 << 18
"""Numbers in the rows that are formed, or copied into another layout, at once, where what is made of them is not larger anyway."""


@dataclass(frozen=True)
class OneHot:
    """Rows that are unit vectors, by index: (N, R) indices into `size`; `mask` is False where a row counts as zero."""

    index: Tensor
    size: int
    mask: Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of groups that have different numbers of them, filled up with zeros: a (G, N, R, in); `mask` (G, N, R) is 1 for a row, else 0."""

    a: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Rows:
    """The normal form of a layer whose gradient is a matrix product: dW = sum over rows of g a^T, in each of G groups.

    a: (G, N, R, in), without the homogeneous 1; or OneHot, or Ragged. g: (K, G, N, R, out). N examples with R shared positions.
    `input_first`: the weight is stored (in, out), so that its rows are inputs.
    """

    a: Tensor | OneHot | Ragged
    g: Tensor
    input_first: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of a module that is a layer of its own in all but its hook: its rule, and the module's name of its 'weight' and 'bias'."""

    rule: Rule
    parameters: Mapping[str, str]


class Rule(ABC):
    """What the library knows of one family of layers.

    `joint`: row o of the weight and entry o of the bias belong to one output unit, so [W, b] is one matrix.
    `elementwise`: weight and bias scale and shift single coordinates (normalisation layers); a unit is a 2 x 2 block.
    `linear`: it has the normal form `Rows`. `input_first`: its weight is stored (in, out). `one_hot`: its inputs are unit vectors.
    `packed`: its groups are several matrices in one tensor, which may read the same input.
    """

    joint: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    input_first: ClassVar[bool] = False
    one_hot: ClassVar[bool] = False
    packed: ClassVar[bool] = False

    @abstractmethod
    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        """Gradients of the layer's parameters `names` by column and example: (K, n, *param.shape) for the n examples."""

    def inputs(self, seen: LayerColumns) -> Tensor | OneHot | Ragged:
        """A of the normal form, (G, N, R, in); only where `linear` is True."""
        raise NotImplementedError(f"the rule {type(self).__name__} is not linear.")

    def outputs(self, seen: LayerColumns) -> Tensor:
        """G of the normal form, (K, G, N, R, out); only where `linear` is True."""
        raise NotImplementedError(f"the rule {type(self).__name__} is not linear.")

    def input_moment(self, seen: LayerColumns, homogeneous: bool) -> tuple[Tensor, int] | None:
        """The sum of a a^T over the rows that `inputs` gives, (G, in', in'), and their number; None where to form them is cheaper.

        homogeneous: a has a 1 at its end.
        """
        return None

    def rows(self, seen: LayerColumns) -> Rows:
        """The normal form; only where `linear` is True."""
        return Rows(self.inputs(seen), self.outputs(seen), input_first=self.input_first)

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        """The gradient summed over examples and columns."""
        return {n: g.sum((0, 1)) for n, g in self.gradients(seen, names, slice(None)).items()}

    def groups(self, module: nn.Module) -> int:
        """G of the normal form."""
        return 1

    def pieces(self, module: nn.Module) -> Mapping[str, Piece]:
        """The matrices that a module of several holds, by name; none: the module is one."""
        return {}

    def knows(self, module: nn.Module) -> bool:
        """Whether the module's own parameters are those of the family: another one (`weight_norm`'s) is not in its formula."""
        return set(module._parameters) <= {"weight", "bias"}

    def leading(self, seen: LayerColumns) -> int:
        """How many examples the call's input holds by its shape: the leading dimension, 1 for a single vector."""
        x = seen.input
        return x.shape[0] if x.dim() > 1 or (not x.is_floating_point() and x.dim()) else 1

    def check(self, seen: LayerColumns) -> None:
        """Refuse per-example quantities of a layer whose leading dimension is not the batch: they would be silently wrong."""
        leading = self.leading(seen)
        if seen.rows is None and leading == seen.batch > 1 and counts_up(seen):
            raise ObservationError(
                f"layer {seen.name!r} was called on the indices 0 to {leading - 1} for a batch of {seen.batch} examples: positions that all of them "
                f"share, rows={{{seen.name!r}: 'shared'}}, or an index an example, rows={{{seen.name!r}: 'flattened'}}? Their gradients differ: say which."
            )
        if seen.rows is None and leading != seen.batch:
            raise ObservationError(
                f"layer {seen.name!r} has {leading} leading rows for a batch of {seen.batch} examples, so its rows cannot be told apart by "
                f"example. Say how it enumerates them, rows={{{seen.name!r}: 'flattened'}} (batch and positions flattened together) or 'second' "
                "(the batch is the second dimension), or use a representation that needs no examples: 'kron_io' with sharing='expand'."
            )

    def refuse(self, module: nn.Module) -> str | None:
        """Why the rule would be silently wrong for this module, or None."""
        return None


def counts_up(seen: LayerColumns) -> bool:
    """Whether a call read the indices 0, 1, 2, ... once, as positions that all examples share are: reads them on the host."""
    index = seen.input
    one = index.dim() == 1 or (index.dim() == 2 and index.shape[0] == 1)
    if index.is_floating_point() or not one or index.numel() < 2:
        return False
    return bool((index.reshape(-1) == torch.arange(index.numel(), device=index.device)).all())


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


def output_grad(seen: LayerColumns) -> Tensor:
    """The columns at the layer's output as they came, (K, *output.shape), in at least float32."""
    grad = seen.grad
    assert grad is not None, "calls without columns are dropped when an observation is assembled"
    return wide(grad)


def layer_grad(seen: LayerColumns) -> Tensor:
    """The columns at the layer's output, (K, N, ...), in at least float32."""
    return arrange(output_grad(seen), seen, columns=1)


def channel_input(seen: LayerColumns, dims: Sequence[int]) -> Tensor:
    """The input (M, C, *spatial) of a layer with channels second, as it came, in at least float32; refused where M or C is not there."""
    x = seen.input
    if x.dim() not in dims:
        kind = " or ".join(f"{d}-dimensional" for d in dims)
        raise ObservationError(
            f"layer {seen.name!r} ({type(seen.module).__name__}) takes a {x.dim()}-dimensional input, without a batch in front: "
            f"give it a {kind} one (unsqueeze(0) for a single example), or leave it out with overrides={{{seen.name!r}: None}}."
        )
    if seen.rows == "second":
        raise ObservationError(
            f"rows={{{seen.name!r}: 'second'}}: the second dimension of a {type(seen.module).__name__}'s input holds channels, not examples."
        )
    return wide(x)


def channel_rows(product: Tensor, seen: LayerColumns) -> Tensor:
    """(K, M, C, *spatial) summed over positions, (K, N, C)."""
    rows = product.reshape(*product.shape[:3], -1).sum(-1)
    return arrange(rows, seen, 1).sum(2) if seen.rows == "flattened" else rows


def example_rows(rows: Tensor, seen: LayerColumns, columns: int) -> Tensor:
    """Rows (..., M, R, width) with `columns` dimensions before M to (..., N, M / N * R, width), where M enumerates examples and positions."""
    return arrange(rows, seen, columns).flatten(columns + 1, columns + 2) if seen.rows == "flattened" else rows
