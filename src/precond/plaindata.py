"""Objects from plain data, as TOML gives it: names and options are checked, and what is wrong is told with its place in the file."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
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
    """Whether plain data may stand where a class expects this type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint) and get_origin(hint) is not tuple:
        return any(fits(value, each) for each in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint if isinstance(hint, type) else (bool, int, float, str, list))


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return " or ".join(kinds[h] for h in (get_args(hint) or (hint,)) if h in kinds) or "of another type"
