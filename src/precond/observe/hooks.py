"""Hook objects that leave no trace: weak to their owner, inert in a copy, gone from a pickle.

torch stores hooks in the module, so `copy.deepcopy(model)` and `torch.save(model)` meet them. A copied hook must do
nothing (the copy is somebody else's model) and a pickled one must not need this library to be loaded again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol


class Removable(Protocol):
    """What torch gives back for a hook."""

    def remove(self) -> None: ...


# `nullcontext().__exit__` takes any arguments and returns None: a hook of the standard library that does nothing.
_INERT: tuple[Any, tuple[Any, str]] = (getattr, (contextlib.nullcontext(), "__exit__"))


class Hook:
    """Calls `owner.method(*bound, *args)` as long as the owner lives."""

    def __init__(self, method: Callable[..., Any], *bound: Any) -> None:
        self._method, self._bound = weakref.WeakMethod(method), bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self._method()
        return None if method is None else method(*self._bound, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _INERT[0](*_INERT[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _INERT


class Handles:
    """The hooks an observer holds; `remove()` leaves none behind."""

    def __init__(self, handles: Iterable[Removable] = ()) -> None:
        self._handles = list(handles)

    def add(self, *handles: Removable) -> None:
        self._handles.extend(handles)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
