"""The partition of a model's parameters into blocks.

Every trainable parameter belongs to one *layer* (the module that owns it and whose forward uses it) and may be used by
several (tied weights). A representation asks for blocks of a scope: the whole model, a layer, or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn
from torch.nn.utils import parametrize

from precond.blocks import Block, Layer, Parameter, Scope, users
from precond.layers import resolve_rule
from precond.observe import canonical

_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


class Partition:
    """Layers, parameters and blocks of a model (without its wrappers)."""

    def __init__(self, model: nn.Module, held: Callable[[], frozenset[int] | None] = lambda: None) -> None:
        self.model, self._held = model, held
        ids = held()
        trainable = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.tensors = {n: p for n, p in trainable.items() if p.numel() and (ids is None or id(p) in ids)}
        """Canonical name -> the parameter itself, for all that are trained and have entries."""
        self.unheld = {n: tuple(p.shape) for n, p in trainable.items() if n not in self.tensors}
        """Shapes of the trainable parameters that the optimizer does not hold, or that have no entries."""
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
            elif scope == "tensor":
                made.extend(self._block(p.name, (p,)) for p in params)
            elif scope == "kernel":
                made.extend(self._block(owner, params).kernels())
            else:
                made.extend(self._block(owner, params).matrices())
        return made

    def _block(self, name: str, params: tuple[Parameter, ...]) -> Block:
        return Block(name, params, users(self.layers, params))


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
        if id(module) in claimed or (isinstance(module, _CONTAINERS) and module is not model):
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
        found[name] = Parameter(name, tuple(p.shape), start, uses[name][0][0], tuple(uses[name]))
        start += p.numel()
    return found
