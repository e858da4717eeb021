"""Tensors inside the nested arguments and outputs of a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors_in(getattr(tree, field.name))


def field_of(tree: Any, name: str) -> Any:
    """An entry of a mapping, or an attribute; None where there is neither."""
    return tree.get(name) if isinstance(tree, Mapping) else getattr(tree, name, None)


def detached(tree: Any) -> Any:
    """The same nest with every tensor detached (no copy)."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, Mapping):
        return {key: detached(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple is built by position
        return type(tree)(*(detached(value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(detached(value) for value in tree)
    return tree


def apart(tree: Any) -> Any:
    """Several outputs, each as a view of its own: the gradient that comes back at one is not also that of another which was made from it.

    In tuples and lists; anything else, and a single output, is handed on as it is.
    """
    if type(tree) not in (tuple, list) or sum(tensor.requires_grad for tensor in tensors_in(tree)) < 2:
        return tree
    return _viewed(tree)


def _viewed(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.view_as(tree) if tree.requires_grad else tree
    return type(tree)(_viewed(value) for value in tree) if type(tree) in (tuple, list) else tree


def versions(tree: Any) -> tuple[int, ...]:
    """The in-place counters of all tensors: unequal later means that somebody wrote into one."""
    return tuple(tensor._version for tensor in tensors_in(tree) if not tensor.is_inference())
