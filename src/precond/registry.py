"""One registry class, used by the three axes: a name, a class, and where else to look."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from precond.errors import UnknownName

T = TypeVar("T")
C = TypeVar("C", bound=type)


def closest(name: str, known: Iterable[str]) -> str:
    """The part of a message that helps after a typing error: the closest name and all there are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} There are: {', '.join(known)}."


class Registry(Generic[T]):
    """The members of one axis by name.

    A third party adds a member without touching this repository through the entry-point group
    `precond.<axis>`; it is imported when it is first asked for.
    """

    def __init__(self, axis: str, base: type[T]) -> None:
        self.axis, self.base = axis, base
        self._members: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: put a class into the registry; its `name` becomes the registry key."""

        def decorate(cls: C) -> C:
            if not issubclass(cls, self.base):
                raise TypeError(f"{cls.__name__} must derive from {self.base.__name__} to be one of the {self.axis}.")
            if name in self._members and self._members[name] is not cls:
                raise ValueError(f"{name!r} is already one of the {self.axis}: choose another name.")
            cls.name = name  # type: ignore[attr-defined]
            self._members[name] = cls
            return cls  # type: ignore[return-value]  # the check above narrowed it

        return decorate

    def names(self) -> list[str]:
        """Every name, built-in members first, in the order of the documentation."""
        return [*self._members, *(n for n in self._plugins() if n not in self._members)]

    def get(self, name: str) -> type[T]:
        """The class registered under `name`; raises `UnknownName` with the closest name."""
        if name in self._members:
            return self._members[name]
        plugins = self._plugins()
        if name in plugins:
            cls: type[T] = self.register(name)(plugins[name].load())
            return cls
        raise UnknownName(f"{name!r} is not one of the {self.axis}{closest(name, self.names())}")

    def create(self, spec: str | T | type[T]) -> T:
        """An instance, from a name, a class (both with default options) or an instance."""
        if isinstance(spec, str):
            return self.get(spec)()
        if isinstance(spec, type) and issubclass(spec, self.base):
            return spec()
        if isinstance(spec, self.base):
            return spec
        raise TypeError(
            f"one of the {self.axis} is given by its name or an instance, not by a {type(spec).__name__}; "
            f"names: {', '.join(self.names())}."
        )

    def _plugins(self) -> dict:  # type: ignore[type-arg]
        return {e.name: e for e in entry_points(group=f"precond.{self.axis}")}
