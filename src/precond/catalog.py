"""Recipes: published methods as data. A recipe names a member of each axis with its options, the outer update, and the source."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from precond import damping, history, schedule, transforms
from precond.errors import PrecondError, UnknownName
from precond.matrices import REGISTRY as MATRICES
from precond.options import BeforeStart
from precond.plaindata import RecipeError, check_numbers, choose, fits, instance, line_of, named
from precond.preconditioner import Preconditioner
from precond.registry import Registry, closest
from precond.representations import REGISTRY as REPRESENTATIONS
from precond.solvers import REGISTRY as SOLVERS

_TEXT = ("title", "formula", "summary", "citation", "cost", "scope")
_AXES = ("matrix", "repr", "solver")
_OPTIONS = ("damping", "history", "transforms", "curvature_interval", "solver_interval", "start_step", "before_start")
_SECTIONS = (*_TEXT, *_AXES, *_OPTIONS, "optimizer")
_AXIS_OF: dict[str, Registry[Any]] = {"matrix": MATRICES, "repr": REPRESENTATIONS, "solver": SOLVERS}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method: a triple with options, what is around it, and the outer update.

    matrix, repr, solver: registry names. axes: the options of each. options: the arguments of `Preconditioner`, as
    plain data. outer: the `torch.optim` class and its arguments. scope: "L" (one mini-batch), "G" (several steps).
    """

    name: str
    title: str
    formula: str
    summary: str
    citation: str
    cost: str
    scope: str
    axes: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    outer: Mapping[str, Any]

    @property
    def matrix(self) -> str:
        return str(self.axes["matrix"]["name"])

    @property
    def repr(self) -> str:
        return str(self.axes["repr"]["name"])

    @property
    def solver(self) -> str:
        return str(self.axes["solver"]["name"])

    def build(self, **overrides: Any) -> Preconditioner:
        """An unattached preconditioner; any argument of `Preconditioner` overrides the recipe's."""
        arguments: dict[str, Any] = {}
        for axis, spec in self.axes.items():
            choose(spec["name"], _AXIS_OF[axis].names(), f"of the {_AXIS_OF[axis].axis}", axis)
            arguments[axis] = instance(_AXIS_OF[axis].get(spec["name"]), spec, axis)
        arguments |= {key: _option(key, value) for key, value in self.options.items()}
        return Preconditioner(**{**arguments, **overrides})

    def optimizer(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], **overrides: Any) -> torch.optim.Optimizer:
        """The outer update the paper uses, a stock `torch.optim` class; arguments given here win."""
        options = {k: v for k, v in self.outer.items() if k != "name"} | overrides
        made: torch.optim.Optimizer = getattr(torch.optim, str(self.outer["name"]))(params, **options)
        return made


def recipes() -> list[str]:
    """The names of all recipes.

    >>> "kfac" in recipes()
    True
    """
    return sorted(f.name.removesuffix(".toml") for f in files("precond._recipes").iterdir() if f.name.endswith(".toml"))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or from the path of a TOML file of your own.

    Raises:
        UnknownName: no such recipe. RecipeError: a file that cannot be read, with the key and the nearest one.

    >>> load_recipe("kfac").repr
    'kron_io'
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {str(path)!r}.")
        try:
            return _parse(path.stem, path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not text in UTF-8, as TOML is: {error}.") from error
    if str(name) not in recipes():
        raise UnknownName(f"{str(name)!r} is not a recipe{closest(str(name), recipes())} A file of your own ends in .toml.")
    return _parse(str(name), files("precond._recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"{name}.toml")


def recipe(name: str | Path, **overrides: Any) -> Preconditioner:
    """The preconditioner of a recipe, unattached.

    >>> recipe("kfac", damping=1e-2).triple.solver.name
    'cholesky'
    """
    return load_recipe(name).build(**overrides)


def _parse(name: str, text: str, where: str) -> Recipe:
    try:
        data = _read(text)
        check_numbers(data)
        return _checked(name, data)
    except RecipeError as error:
        raise RecipeError(f"{where}{line_of(text, error.at)}: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: its lists or tables lie too deep in each other to be read.") from error


def _read(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"it is not TOML: {error}.") from error
    except ValueError as error:  # Python's own bound on digits, far beyond TOML's
        raise RecipeError("it has a whole number of more than 64 bits, which TOML does not have.") from error


def _checked(name: str, data: dict[str, Any]) -> Recipe:
    for key in data:
        if key not in _SECTIONS:
            raise RecipeError(f"{key!r} is no key of a recipe{closest(key, _SECTIONS)}", key)
    for key in (*_TEXT, *_AXES):
        if key not in data:
            raise RecipeError(f"the key {key!r} is missing.")
    for key in _TEXT:
        if not isinstance(data[key], str):
            raise RecipeError(f"{key!r} is text, in quotes, not {data[key]!r}.", key)
    if data["scope"] not in ("L", "G"):
        raise RecipeError(f"'scope' is 'L' (one mini-batch) or 'G' (several steps), not {data['scope']!r}.", "scope")
    axes = {axis: named(data[axis], axis) for axis in _AXES}
    options = {key: data[key] for key in _OPTIONS if key in data}
    outer = named(data.get("optimizer", {"name": "SGD", "lr": 0.1}), "optimizer")
    choose(outer["name"], _optimizers(), "of the optimizers of torch.optim", "optimizer")
    result = Recipe(name=name, **{key: data[key] for key in _TEXT}, axes=axes, options=options, outer=outer)
    instance(_optimizers()[outer["name"]], outer, "optimizer", [nn.Parameter(torch.zeros(1, 1))])
    try:
        result.build()
    except RecipeError:
        raise
    except PrecondError as error:  # every argument is right, and the cell has no meaning
        raise RecipeError(str(error)) from error
    return result


def _option(key: str, value: Any) -> Any:
    """An argument of `Preconditioner` from plain data, checked."""
    if key == "transforms":
        if not isinstance(value, list):
            raise RecipeError(f"'transforms' is a list, one [[transforms]] table each, not {value!r}.", key)
        return [_object(transforms, spec, transforms.Transform, key) for spec in value]
    if key in _OBJECTS and isinstance(value, dict):
        return _object(*_OBJECTS[key](value), key)
    try:
        _CHECKS[key](value)
    except (TypeError, ValueError, PrecondError) as error:
        raise RecipeError(f"{key!r}: {error}", key) from error
    return value


def _before_start(value: Any) -> None:
    if value not in get_args(BeforeStart):
        raise ValueError(f"it is {' or '.join(map(repr, get_args(BeforeStart)))}, not {value!r}.")


def _count(value: Any) -> None:
    if not fits(value, int) or value < 0:
        raise ValueError(f"it is a number of steps, 0 or more, not {value!r}.")


def _object(module: Any, spec: Any, base: type, key: str) -> Any:
    spec = named(spec, key)
    choose(spec["name"], _classes(module, base), f"of the classes for {key!r}", key)
    return instance(_classes(module, base)[spec["name"]], spec, key)


def _classes(module: Any, base: type) -> dict[str, type]:
    """The concrete classes derived from `base` that a module has."""
    found = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    return {n: c for n, c in found.items() if not inspect.isabstract(c)}


def _optimizers() -> dict[str, type]:
    return _classes(torch.optim, torch.optim.Optimizer)


_OBJECTS: dict[str, Callable[[Any], tuple[Any, Any, type]]] = {
    "history": lambda value: (history, value, history.History),
    "damping": lambda value: (damping, value, damping.Damping),
}
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "damping": lambda value: damping.resolve(value, damping.Tikhonov), "history": history.resolve,
    "curvature_interval": schedule.resolve, "solver_interval": schedule.resolve, "start_step": _count,
    "before_start": _before_start,
}  # fmt: skip
