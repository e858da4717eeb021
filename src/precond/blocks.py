"""A block: parameters that are preconditioned together, the layers that use them, and the coordinates of its vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from precond.layers import GENERIC, Rule
from precond.observe import LayerColumns, Part, Tensors
from precond.tiling import Tiling

Scope = Literal["model", "layer", "matrix", "tensor", "kernel"]
_CHUNK_ELEMENTS = 1 << 24  # gradients by example are formed this many numbers at a time


@dataclass(frozen=True)
class Layer:
    """A module whose calls are observed. `parameters`: local name -> canonical name of each trainable parameter it uses.

    A piece of a module has the module's calls, a rule of its own, and 'weight' and 'bias' for local names; `stored` is what the
    module calls them.
    """

    name: str
    module: nn.Module
    rule: Rule
    parameters: Mapping[str, str]
    stored: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, local: str) -> nn.Parameter:
        return self.module.get_parameter(self.stored.get(local, local))

    def pieces(self) -> dict[str, Layer]:
        """The matrices that a module of several holds, by name."""
        found = {}
        for name, piece in self.rule.pieces(self.module).items():
            used = {role: self.parameters[local] for role, local in piece.parameters.items() if local in self.parameters}
            if used:
                found[name] = replace(self, rule=piece.rule, parameters=used, stored=piece.parameters)
        return found

    def total(self, seen: LayerColumns) -> Tensors:
        """The gradient of one call, summed over examples, by canonical name."""
        return {self.parameters[n]: g for n, g in self.rule.total(seen, list(self.parameters)).items()}


@dataclass(frozen=True)
class Parameter:
    """One trainable parameter. `start`: where it begins in the model's flat order. `uses`: (layer, local name)."""

    name: str
    shape: tuple[int, ...]
    start: int
    owner: str
    uses: tuple[tuple[str, str], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """Parameters that are preconditioned together, and their coordinates.

    flat: each parameter flattened row-major, one after another. matrix: row-major vec of [W, b] with `rows` rows, the
    homogeneous coordinate last; `width` columns in all. `transposed`: the weight is stored as (width, rows). `tiling`: of one tensor, its entries
    tile by tile.
    """

    name: str
    parameters: tuple[Parameter, ...]
    layers: Mapping[str, Layer]
    rows: int | None = None
    transposed: bool = False
    tiling: Tiling | None = None

    @property
    def n(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def shape(self) -> tuple[int, ...]:
        """Natural shape of the block's vector: (rows, width) for matrix coordinates, the tensor's own, or (n,)."""
        if self.rows is not None:
            return (self.rows, self.n // self.rows)
        return (self.parameters[0].shape or (1,)) if len(self.parameters) == 1 else (self.n,)

    @property
    def homogeneous(self) -> bool:
        """[W, b]: the bias is the last column."""
        return self.rows is not None and len(self.parameters) == 2

    def gather(self, values: Tensors, lead: int = 0) -> Tensor:
        """Parameter tensors with `lead` leading dimensions -> vectors (*lead, n) in the block's coordinates."""
        parts = []
        for p in self.parameters:
            value = values[p.name]
            if self.transposed and len(p.shape) == 2:
                value = value.transpose(-1, -2)
            ends = (self.rows, -1) if self.rows is not None else (-1,)
            parts.append(value.reshape(*value.shape[:lead], *ends))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.tiling is not None:
            return self.tiling.arrange(joined)
        return joined.flatten(lead) if self.rows is not None else joined

    def scatter(self, vector: Tensor) -> Tensors:
        """Vectors (*lead, n) -> parameter tensors (*lead, *shape), views where the layout allows."""
        lead = vector.shape[:-1]
        if self.tiling is not None:
            vector = self.tiling.restore(vector)
        if self.rows is None:
            pieces = vector.split([p.numel for p in self.parameters], dim=-1)
        else:
            table = vector.reshape(*lead, self.rows, -1)
            pieces = table.split([p.numel // self.rows for p in self.parameters], dim=-1)
        if self.transposed:
            pieces = [piece.transpose(-1, -2) if len(p.shape) == 2 else piece for p, piece in zip(self.parameters, pieces, strict=True)]
        return {p.name: piece.reshape((*lead, *p.shape)) for p, piece in zip(self.parameters, pieces, strict=True)}

    def positions(self) -> Tensor:
        """Where each coordinate stands in the model's flat parameter order."""
        indices = {p.name: torch.arange(p.start, p.start + p.numel).view(p.shape) for p in self.parameters}
        return self.gather(indices)

    def matrices(self) -> Iterator[Block]:
        """Its parameters by matrix: one [W, b] where weight and bias belong together row by row, else tensor by tensor."""
        for owner in dict.fromkeys(p.owner for p in self.parameters):
            layer = self.layers[owner]
            for piece, view in (layer.pieces() or {"": layer}).items():
                names = {name: local for local, name in view.parameters.items()}
                local = {names[p.name]: p for p in self.parameters if p.owner == owner and p.name in names}
                rows = _matrix_rows(view.rule, local)
                if rows is not None:
                    transposed = view.rule.joint and view.rule.input_first
                    name = ".".join(part for part in (owner, piece) if part) or "model"
                    yield replace(self._restricted(name, tuple(local.values()), rows), transposed=transposed)
                else:
                    for p in local.values():
                        yield self._restricted(p.name, (p,), p.shape[0] if len(p.shape) > 1 else p.numel)

    def kernels(self) -> Iterator[Block]:
        """Its parameters one by one; rows are kernels, one an output and an input, where a tensor is of order 3 or more."""
        for block in self.matrices():
            for p in block.parameters:
                rows = math.prod(p.shape[:2]) if len(p.shape) > 2 else block.rows if len(p.shape) == 2 else p.numel
                assert rows is not None
                yield replace(block._restricted(p.name, (p,), rows), transposed=block.transposed)

    def _restricted(self, name: str, params: tuple[Parameter, ...], rows: int) -> Block:
        """Some of its parameters in matrix coordinates; of a layer in pieces, the piece that has them all."""
        wanted, layers = {p.name for p in params}, users(self.layers, params)
        for n, layer in layers.items():
            pieces = [piece for piece in layer.pieces().values() if wanted <= set(piece.parameters.values())]
            layers[n] = pieces[0] if pieces else layer
        return Block(name, params, layers, rows)

    def calls(self, part: Part) -> Iterator[tuple[Layer, LayerColumns]]:
        """The observed calls of the layers that use the block's parameters."""
        for name, layer in self.layers.items():
            for seen in part.layers.get(name, ()):
                yield layer, seen

    def gradients(self, part: Part) -> Iterator[Tensor]:
        """Gradients by column and example in block coordinates, (K, n_chunk, n), a bounded number of them at a time."""
        calls = list(self.calls(part))
        if not calls:
            return
        columns = next(g.shape[0] for _, seen in calls for g in seen.grads if g is not None)
        step = max(1, _CHUNK_ELEMENTS // max(1, columns * self.n))
        wanted = {p.name for p in self.parameters}
        for layer, seen in calls:
            layer.rule.check(seen)
        for start in range(0, part.batch, step):
            values: Tensors = {}
            examples = slice(start, min(start + step, part.batch))
            for layer, seen in calls:
                local = [n for n, name in layer.parameters.items() if name in wanted]
                for n, gradient in layer.rule.gradients(seen, local, examples).items():
                    name = layer.parameters[n]
                    values[name] = values[name] + gradient if name in values else gradient
            sample = next(iter(values.values()))
            for p in self.parameters:
                values.setdefault(p.name, sample.new_zeros(*sample.shape[:2], *p.shape))
            yield self.gather(values, lead=2)


def users(layers: Mapping[str, Layer], params: tuple[Parameter, ...]) -> dict[str, Layer]:
    """The layers that use any of the parameters."""
    users = {layer for p in params for layer, _ in p.uses}
    return {name: layer for name, layer in layers.items() if name in users}


def _matrix_rows(rule: Rule, local: Mapping[str, Parameter]) -> int | None:
    """The rows of [W, b] where weight and bias belong together row by row, else None."""
    if "weight" not in local or not set(local) <= {"weight", "bias"} or rule is GENERIC:
        return None
    weight, joint = local["weight"], "bias" not in local or rule.joint
    rows = weight.numel if rule.elementwise else weight.shape[1 if rule.joint and rule.input_first else 0]
    return rows if joint and ("bias" not in local or local["bias"].numel == rows) else None
