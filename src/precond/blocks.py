"""The partition of a model's parameters into blocks, and the coordinates inside each.

Every trainable parameter belongs to one *layer* (the module that owns it and whose forward uses it) and may be used by
several (tied weights). A representation asks for blocks of a scope: the whole model, a layer, or a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from precond.layers import Rule, check_examples, resolve_rule
from precond.observe import LayerColumns, Part, Tensors, canonical

Scope = Literal["model", "layer", "matrix", "tensor"]
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
_CHUNK_ELEMENTS = 1 << 24  # gradients by example are formed this many numbers at a time


@dataclass(frozen=True)
class Layer:
    """A module whose calls are observed. `parameters`: local name -> canonical name of each trainable parameter it uses."""

    name: str
    module: nn.Module
    rule: Rule
    parameters: Mapping[str, str]

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
    homogeneous coordinate last; `width` columns in all.
    """

    name: str
    parameters: tuple[Parameter, ...]
    layers: Mapping[str, Layer]
    rows: int | None = None

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
            ends = (self.rows, -1) if self.rows is not None else (-1,)
            parts.append(value.reshape(*value.shape[:lead], *ends))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return joined.flatten(lead) if self.rows is not None else joined

    def scatter(self, vector: Tensor) -> Tensors:
        """Vectors (*lead, n) -> parameter tensors (*lead, *shape), views where the layout allows."""
        lead = vector.shape[:-1]
        if self.rows is None:
            pieces = vector.split([p.numel for p in self.parameters], dim=-1)
        else:
            table = vector.reshape(*lead, self.rows, -1)
            pieces = table.split([p.numel // self.rows for p in self.parameters], dim=-1)
        return {p.name: piece.reshape(*lead, *p.shape) for p, piece in zip(self.parameters, pieces, strict=True)}

    def positions(self) -> Tensor:
        """Where each coordinate stands in the model's flat parameter order."""
        indices = {p.name: torch.arange(p.start, p.start + p.numel).view(p.shape) for p in self.parameters}
        return self.gather(indices)

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
            if seen.rows is None and layer.rule.modules:
                check_examples(seen, leading_size(seen))
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


def leading_size(seen: LayerColumns) -> int:
    """The leading dimension of the layer's input, 1 for a single vector."""
    x = seen.input
    return x.shape[0] if x.dim() > 1 or (not x.is_floating_point() and x.dim()) else 1


class Partition:
    """Layers, parameters and blocks of a model (without its wrappers)."""

    def __init__(self, model: nn.Module, held: Callable[[], frozenset[int] | None] = lambda: None) -> None:
        self.model, self._held = model, held
        ids = held()
        trainable = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.tensors = {n: p for n, p in trainable.items() if ids is None or id(p) in ids}
        """Canonical name -> the parameter itself, for all that are trained."""
        self.unheld = {n: tuple(p.shape) for n, p in trainable.items() if n not in self.tensors}
        """Shapes of the trainable parameters that the optimizer does not hold."""
        self.layers = _layers(model, self.tensors)
        self.parameters = _parameters(self.tensors, self.layers)
        self._signature = self._present()

    def _present(self) -> tuple[int, ...]:
        ids = self._held()
        return tuple(id(p) for p in self.model.parameters() if p.requires_grad and (ids is None or id(p) in ids))

    def outdated(self) -> bool:
        """Whether a parameter was frozen, added or swapped since."""
        return self._present() != self._signature

    def owned(self, layer: str) -> list[Parameter]:
        return [p for p in self.parameters.values() if p.owner == layer]

    def blocks(self, owners: Sequence[str], scope: Scope) -> list[Block]:
        """The blocks of a scope over the parameters that the layers `owners` own."""
        if scope == "model":
            params = tuple(p for p in self.parameters.values() if p.owner in set(owners))
            return [self._block("model", params)] if params else []
        made = []
        for owner in owners:
            params = tuple(self.owned(owner))
            if not params:
                continue
            if scope == "layer":
                made.append(self._block(owner or "model", params))
            elif scope == "matrix" and (rows := self._matrix_rows(owner, params)) is not None:
                made.append(self._block(owner or "model", params, rows))
            else:
                for p in params:
                    rows = None if scope == "tensor" else p.shape[0] if len(p.shape) > 1 else p.numel
                    made.append(self._block(p.name, (p,), rows))
        return made

    def _matrix_rows(self, owner: str, params: tuple[Parameter, ...]) -> int | None:
        """The rows of [W, b] where weight and bias belong together row by row, else None."""
        layer = self.layers[owner]
        names = {canonical_name: local for local, canonical_name in layer.parameters.items()}
        local = {names[p.name]: p for p in params}
        if "weight" not in local or not set(local) <= {"weight", "bias"} or not layer.rule.modules:
            return None
        weight = local["weight"]
        rows = weight.numel if layer.rule.elementwise else weight.shape[0]
        if "bias" in local and not (layer.rule.joint and local["bias"].numel == rows):
            return None
        return rows

    def _block(self, name: str, params: tuple[Parameter, ...], rows: int | None = None) -> Block:
        users = {layer for p in params for layer, _ in p.uses}
        return Block(name, params, {n: layer for n, layer in self.layers.items() if n in users}, rows)


def _claims_subtree(module: nn.Module) -> bool:
    """Modules whose children's own hooks never fire, or fire without the batch: they are one layer with all inside."""
    return isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)


def _used_by(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the module's own forward uses, by local name."""
    if _claims_subtree(module):
        yield from module.named_parameters(remove_duplicate=False)
        return
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):  # never called: its entries are its parent's
            for inner, p in child.named_parameters(remove_duplicate=False):
                yield f"{name}.{inner}", p


def _layers(model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> dict[str, Layer]:
    """Every module that uses a trained parameter in its own forward."""
    names = {id(p): n for n, p in tensors.items()}
    layers: dict[str, Layer] = {}
    claimed: set[int] = set()
    for raw, module in model.named_modules():
        if id(module) in claimed or isinstance(module, _CONTAINERS):
            continue
        if _claims_subtree(module):
            claimed.update(id(inner) for inner in module.modules())
        used = {local: names[id(p)] for local, p in _used_by(module) if id(p) in names}
        if used:
            name = canonical(raw)
            layers[name] = Layer(name, module, resolve_rule(module), used)
    return layers


def _parameters(tensors: Mapping[str, nn.Parameter], layers: Mapping[str, Layer]) -> dict[str, Parameter]:
    """Trained parameters in the model's order, each owned by the first layer that uses it."""
    uses: dict[str, list[tuple[str, str]]] = {}
    for layer in layers.values():
        for local, name in layer.parameters.items():
            uses.setdefault(name, []).append((layer.name, local))
    found: dict[str, Parameter] = {}
    start = 0
    for name, p in tensors.items():
        users = uses[name]
        found[name] = Parameter(name, tuple(p.shape), start, users[0][0], tuple(users))
        start += p.numel()
    return found
