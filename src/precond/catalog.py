"""Recipes: published methods as data. A recipe names a member of each axis with its options, the outer update, and the source."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precond import damping, history, transforms
from precond.errors import PrecondError, UnknownName
from precond.matrices import REGISTRY as MATRICES
from precond.preconditioner import Preconditioner
from precond.registry import Registry, closest
from precond.representations import REGISTRY as REPRESENTATIONS
from precond.solvers import REGISTRY as SOLVERS

_TEXT = ("title", "formula", "summary", "citation", "cost", "scope")
_AXES = ("matrix", "repr", "solver")
_OPTIONS = ("damping", "history", "transforms", "curvature_interval", "solver_interval", "start_step")
_SECTIONS = (*_TEXT, *_AXES, *_OPTIONS, "optimizer")
_AXIS_OF: dict[str, Registry[Any]] = {"matrix": MATRICES, "repr": REPRESENTATIONS, "solver": SOLVERS}


class RecipeError(PrecondError, ValueError):
    """A recipe file that cannot be read; the message names the file, the key, and the nearest one there is."""


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
        arguments: dict[str, Any] = {axis: _member(_AXIS_OF[axis].get(str(spec["name"])), spec, self.name) for axis, spec in self.axes.items()}
        for key, value in self.options.items():
            arguments[key] = _option(key, value, self.name)
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
        return _parse(path.stem, path.read_text(encoding="utf-8"), str(path))
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
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not TOML: {error}.") from error
    for key in data:
        if key not in _SECTIONS:
            raise RecipeError(f"{where}{_line(text, key)}: {key!r} is no key of a recipe{closest(key, _SECTIONS)}")
    for key in (*_TEXT, *_AXES):
        if key not in data:
            raise RecipeError(f"{where}: the key {key!r} is missing.")
    axes = {axis: _named(data[axis], where, axis) for axis in _AXES}
    for axis, spec in axes.items():
        if spec["name"] not in _AXIS_OF[axis].names():
            line = _line(text, str(spec["name"]))
            raise RecipeError(f"{where}{line}: {spec['name']!r} is not one of the {_AXIS_OF[axis].axis}{closest(str(spec['name']), _AXIS_OF[axis].names())}")
    outer = _named(data.get("optimizer", {"name": "SGD", "lr": 0.1}), where, "optimizer")
    made = getattr(torch.optim, str(outer["name"]), None)
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise RecipeError(f"{where}{_line(text, str(outer['name']))}: torch.optim has no optimizer {outer['name']!r}.")
    options = {key: data[key] for key in _OPTIONS if key in data}
    result = Recipe(name=name, **{key: str(data[key]) for key in _TEXT}, axes=axes, options=options, outer=outer)
    try:
        result.build()
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    return result


def _named(spec: Any, where: str, key: str) -> dict[str, Any]:
    """`key = "name"` or `[key]` with a name and options."""
    made = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(made, dict) or not isinstance(made.get("name"), str):
        raise RecipeError(f"{where}: {key!r} is a name, or a table with a name and options.")
    return made


def _line(text: str, word: str) -> str:
    """', line N' of the first line that starts with or quotes a word."""
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip().lstrip("[").strip()
        if stripped.startswith(word) or f'"{word}"' in line:
            return f", line {number}"
    return ""


def _member(cls: type, spec: Mapping[str, Any], where: str) -> Any:
    """An instance of a class from a table of options; a key it does not have gets the nearest one."""
    options = {k: v for k, v in spec.items() if k != "name"}
    known = {f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")}
    for key in options:
        if key not in known:
            raise RecipeError(f"{key!r} is no option of {spec['name']!r}{closest(key, known) if known else '; it has none.'}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{spec['name']!r}: {error}") from error


def _option(key: str, value: Any, where: str) -> Any:
    """An argument of `Preconditioner` from plain data."""
    if key == "transforms":
        return [_object(transforms, spec, transforms.Transform, where) for spec in value]
    if key == "history" and isinstance(value, dict):
        return _object(history, value, history.History, where)
    if key == "damping" and isinstance(value, dict):
        return _object(damping, value, damping.Damping, where)
    return value


def _object(module: Any, spec: Any, base: type, where: str) -> Any:
    spec = _named(spec, where, base.__name__.lower())
    known = {n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and not getattr(c, "__abstractmethods__", None)}
    known.discard(base.__name__)
    if spec["name"] not in known:
        raise RecipeError(f"{spec['name']!r} is no {base.__name__.lower()}{closest(str(spec['name']), known)}")
    return _member(getattr(module, str(spec["name"])), spec, where)
