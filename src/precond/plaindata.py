"""Objects from plain data, as TOML gives it: names and options are checked, and what is wrong is told with its place in the file."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from precond.errors import PrecondError
from precond.registry import closest


class RecipeError(PrecondError, ValueError):
    """A recipe file that cannot be read; the message names the file, the line, the key, and the nearest one there is.

    at: words of the file that lead to the place, the section first.
    """

    def __init__(self, message: str, *at: str) -> None:
        super().__init__(message)
        self.at = at


def named(spec: Any, key: str) -> dict[str, Any]:
    """`key = "name"` or `[key]` with a name and options."""
    made = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(made, dict) or not isinstance(made.get("name"), str):
        raise RecipeError(f"{key!r} is a name, or a table with a name and options, not {spec!r}.", key)
    return made


def choose(name: str, known: Iterable[str], what: str, key: str) -> None:
    """Refuse a name that is not among those known, with the closest."""
    if name not in known:
        raise RecipeError(f"{name!r} is not one {what}{closest(name, known)}", key, name)


def check_numbers(data: Any, *at: str) -> None:
    """Refuse whole numbers beyond the 64 bits of TOML, which Python would read, at any depth; at: the keys above."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            check_numbers(value, *at, key)
    elif isinstance(data, list):
        for value in data:
            check_numbers(value, *at)
    elif isinstance(data, int) and not -(2**63) <= data < 2**63:
        raise RecipeError(f"{at[-1]!r} has a whole number of more than 64 bits, which TOML does not have.", *at)


def line_of(text: str, at: Sequence[str]) -> str:
    """', line N': of the first line that starts with or quotes the last word, from the first one's line on; of that one's without it."""
    found = 0
    lines = [line.strip() for line in text.splitlines()]
    for word in at:
        rest = range(max(found - 1, 0), len(lines))
        found = next((i + 1 for i in rest if re.match(rf"[\[\s]*{re.escape(word)}\b", lines[i]) or f'"{word}"' in lines[i]), found)
    return f", line {found}" if found else ""


def instance(cls: type, spec: Mapping[str, Any], key: str, *arguments: Any) -> Any:
    """An instance of a class from a table of options; an option it does not have gets the nearest one, and each its type."""
    options = {k: v for k, v in spec.items() if k != "name"}
    accepted = list(inspect.signature(cls).parameters.values())[len(arguments) :]
    known = {p.name: p for p in accepted if not p.name.startswith("_")}
    hints = _hints(cls)
    for option, value in options.items():
        if option not in known:
            hint = closest(option, known) if known else "; it has none."
            raise RecipeError(f"{option!r} is no option of {spec['name']!r}{hint}", key, option)
        if not fits(value, hints.get(option, Any)):
            raise RecipeError(f"the option {option!r} of {spec['name']!r} is {_describe(hints[option])}, not {value!r}.", key, option)
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise RecipeError(f"{spec['name']!r} needs the option {option!r}.", key)
    try:
        return cls(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{spec['name']!r}: {str(error).rstrip('.')}.", key) from error


def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's arguments; none where it names a type that its own module cannot find."""
    try:
        return get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)  # type: ignore[misc]
    except NameError:
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether plain data may stand where a class expects this type: a list for a tuple or a sequence, a table for a mapping."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin in (tuple, Sequence):
        each = [inner[0]] * len(value) if isinstance(value, list) and _of_any_length(hint) else inner
        return isinstance(value, list) and len(value) == len(each) and all(map(fits, value, each))
    if origin is Mapping:
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if origin is Callable:
        return False
    if inner:
        return any(fits(value, each) for each in inner)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and value == value  # not NaN
    return isinstance(value, hint if isinstance(hint, type) else (bool, int, float, str, list))


def _of_any_length(hint: Any) -> bool:
    return get_origin(hint) is Sequence or ... in get_args(hint)


_KINDS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), bool: ("true or false", "truth values"), str: ("text", "texts")}


def _describe(hint: Any) -> str:
    return _kind(hint) or "of another type"


def _kind(hint: Any, *, many: bool = False) -> str:
    """A type in words; nothing for those that plain data cannot have."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ("names among " if many else "one of ") + ", ".join(map(repr, inner))
    if origin in (tuple, Sequence):
        count = "" if _of_any_length(hint) else f"{len(inner)} "
        return f"{'lists' if many else 'a list'} of {count}{_kind(inner[0], many=True)}"
    if origin is Mapping:
        return "a table of such" if _kind(inner[1]) else ""
    if inner and origin is not Callable:
        return " or ".join(dict.fromkeys(filter(None, (_kind(each, many=many) for each in inner))))
    return _KINDS[hint][many] if hint in _KINDS else ""
