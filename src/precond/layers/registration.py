"""Which rule a module has: by its class, by the name of a class of a library that is not imported, or by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from precond.layers.base import Rule, layer_grad, layer_input
from precond.layers.generic import Generic
from precond.observe import LayerColumns, Tensors

ByExample = Callable[[nn.Module, Tensor, Tensor], Tensors]
"""(module, a (N, ...), g (N, ...)) -> {parameter: (N, *shape)}."""
R = TypeVar("R", bound="type[Rule] | Callable[[nn.Module, Tensor, Tensor], Tensors]")

GENERIC = Generic()
_RULES: dict[type[nn.Module], Rule] = {}
_NAMED: dict[str, Rule] = {}


class Function(Rule):
    """A rule that is one function of the user's, called with one column at a time: under vmap where its operations allow it, else in a loop."""

    def __init__(self, function: ByExample) -> None:
        self.function = function

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        a, g = layer_input(seen)[examples], layer_grad(seen)[:, examples]

        def one(column: Tensor) -> Tensors:
            found = self.function(seen.module, a, column)
            return {n: self._checked(seen, n, found, len(a)) for n in names}

        try:
            mapped: Tensors = torch.func.vmap(one)(g)
            return mapped
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
        looped = [one(column) for column in g]
        return {n: torch.stack([column[n] for column in looped]) for n in names}

    def _checked(self, seen: LayerColumns, name: str, found: Tensors, count: int) -> Tensor:
        want = (count, *seen.module.get_parameter(name).shape)
        got = tuple(found[name].shape) if name in found else None
        if got != want:
            gave = "nothing" if got is None else f"a tensor of shape {got}"
            raise ValueError(
                f"the rule registered for {type(seen.module).__name__} gave {gave} for its parameter {name!r} in layer {seen.name!r}: "
                f"it must give the gradient of each of the {count} examples, {want}."
            )
        return found[name].detach()

    def knows(self, module: nn.Module) -> bool:
        return True


def register(*modules: type[nn.Module] | str) -> Callable[[R], R]:
    """Decorator: how gradients by example are made for these module classes (and subclasses that keep their `forward`).

    It decorates a function (module, a, g) -> {parameter name: gradients}. a (N, ...) is the module's first input and g (N, ...) one
    column: the derivative at its output of the sum over examples of a scalar, per term and unscaled, both with the examples first
    and in at least float32. The gradients are (N, *parameter.shape), one for each example. K columns cost K calls, under vmap where
    the function's operations allow it. It may decorate a subclass of `Rule` too, for a layer with Kronecker factors or units. A class
    of a library that need not be installed is given by its full name. What is registered last counts.

    Raises ValueError, when it is used, if a gradient is missing or has another shape.

    >>> import torch
    >>> class Scale(torch.nn.Module):
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.scale = torch.nn.Parameter(torch.ones(features))
    ...     def forward(self, x):
    ...         return self.scale * x
    >>> @register(Scale)
    ... def scale(module, a, g):
    ...     return {"scale": g * a}
    """

    def decorate(given: R) -> R:
        if isinstance(given, type):
            rule: Rule = given()
        else:
            rule = Function(given)
        for module in modules:
            if isinstance(module, str):
                _NAMED[module] = rule
            else:
                _RULES[module] = rule
        return given

    return decorate


def _found(module: nn.Module) -> Rule | None:
    """The rule of the nearest known base class whose `forward` the module still runs."""
    for base in type(module).__mro__:
        rule = _RULES.get(base) or _NAMED.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule if getattr(type(module), "forward", None) is getattr(base, "forward", None) else None
    return None


def resolve_rule(module: nn.Module) -> Rule:
    """The rule of a module: its family's, else the generic one, as for a module whose weight is made from other tensors."""
    rule = None if parametrize.is_parametrized(module) else _found(module)
    return rule if rule is not None and rule.knows(module) else GENERIC
