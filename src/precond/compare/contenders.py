"""What is compared: torch's own optimizers and the recipes, from one line of text each.

Such a text is a name, with options if need be: `sgd`, `kfac`, `kfac:damping=1e-2`, `shampoo:lr=0.03,momentum=0.5`.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import precond
from precond.errors import PrecondError, UnknownName, UsageError
from precond.registry import closest

Options = dict[str, Any]

BASELINE = "sgd"
"""The yardstick: every ratio of a report is over this contender, so it always runs."""

_OPTIMIZERS: dict[str, tuple[type[Optimizer], Options]] = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (AdamW, {"lr": 1e-3}),
}
_RECIPE_LR = 0.1  # for a recipe whose outer update names no learning rate


@dataclass(frozen=True, kw_only=True)
class Built:
    """A contender at work on one model: what the loop steps, and the preconditioner attached to it, if there is one."""

    optimizer: Optimizer
    preconditioner: precond.Preconditioner | None = None


@dataclass(frozen=True, kw_only=True)
class Contender(ABC):
    """One method with its options.

    Attributes:
        label: the text it was made from, unique in a comparison.
        lr: the learning rate it is known for, the centre of its grid.
        fixed: the user gave `lr=`, so it is not tuned.
    """

    label: str
    lr: float
    fixed: bool

    @abstractmethod
    def build(self, model: nn.Module, criterion: nn.Module, lr: float) -> Built:
        """Set it to work on a model: the loop then only steps the optimizer."""


@dataclass(frozen=True, kw_only=True)
class TorchOptimizer(Contender):
    """A stock optimizer of torch."""

    factory: type[Optimizer]
    options: Options = field(default_factory=dict)

    def build(self, model: nn.Module, criterion: nn.Module, lr: float) -> Built:
        """Make the optimizer; the criterion is not needed."""
        return Built(optimizer=self.factory(model.parameters(), **{**self.options, "lr": lr}))


@dataclass(frozen=True, kw_only=True)
class RecipeContender(Contender):
    """A recipe: its preconditioner attached to the outer optimizer the paper uses."""

    recipe: str
    options: Options = field(default_factory=dict)
    outer: Options = field(default_factory=dict)

    def build(self, model: nn.Module, criterion: nn.Module, lr: float) -> Built:
        """Make the outer optimizer and attach the preconditioner."""
        optimizer = precond.load_recipe(self.recipe).optimizer(model.parameters(), **{**self.outer, "lr": lr})
        preconditioner = precond.recipe(self.recipe, **self.options).attach(model, criterion, optimizer)
        return Built(optimizer=optimizer, preconditioner=preconditioner)


def parse_all(specs: Sequence[str]) -> list[Contender]:
    """Contenders from `--contenders` texts, the baseline first (added when it is not named).

    A comma separates contenders, and the options of one contender: a piece of the form `key=value`
    belongs to the contender before it.
    """
    texts: list[str] = []
    for piece in (piece.strip() for spec in specs for piece in spec.split(",")):
        if not piece:
            continue
        if "=" in piece.partition(":")[0]:
            if not texts:
                raise UsageError(f"{piece!r} is an option without a contender; write it as NAME:{piece}.")
            texts[-1] += "," + piece
        else:
            texts.append(piece)
    if not any(text.partition(":")[0] == BASELINE for text in texts):
        texts.insert(0, BASELINE)
    contenders = [parse(text) for text in dict.fromkeys(texts)]
    return sorted(contenders, key=lambda contender: contender.label.partition(":")[0] != BASELINE)


def parse(text: str) -> Contender:
    """One contender from `name` or `name:key=value,...`; an unknown name or option is refused here, before any training."""
    name, _, rest = text.partition(":")
    options = dict(_option(text, item) for item in rest.split(",") if item)
    if name not in _OPTIMIZERS and name not in precond.recipes():
        raise UnknownName(f"{name!r} is not a contender{closest(name, [*_OPTIMIZERS, *precond.recipes()])}")
    try:
        contender = _optimizer(text, name, options) if name in _OPTIMIZERS else _recipe(text, name, options)
    except PrecondError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"the contender {text!r} cannot be made: {error}.") from error
    return contender


def _option(text: str, item: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not key.strip().isidentifier() or not equals:
        raise UsageError(f"{item!r} in {text!r} is not of the form key=value.")
    try:
        return key.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return key.strip(), {"true": True, "false": False}.get(value.strip().lower(), value.strip())


def _optimizer(text: str, name: str, options: Options) -> Contender:
    factory, defaults = _OPTIMIZERS[name]
    chosen = {**defaults, **options}
    factory(_parameters(), **chosen)  # refuses a wrong option now
    return TorchOptimizer(label=text, lr=float(chosen["lr"]), fixed="lr" in options, factory=factory, options=chosen)


def _parameters() -> list[nn.Parameter]:
    """Something to try an optimizer's options on."""
    return [nn.Parameter(torch.zeros(1, 1))]


def _recipe(text: str, name: str, options: Options) -> Contender:
    recipe = precond.load_recipe(name)
    known = {key: value for key, value in recipe.outer.items() if key != "name"}
    outer = {key: value for key, value in options.items() if key == "lr" or key in known}
    inner = {key: value for key, value in options.items() if key not in outer}
    lr = float({"lr": _RECIPE_LR, **known, **outer}["lr"])
    recipe.optimizer(_parameters(), **{**outer, "lr": lr})  # these two refuse a wrong option now
    precond.recipe(name, **inner)
    return RecipeContender(label=text, lr=lr, fixed="lr" in options, recipe=name, options=inner, outer=outer)
