"""The command line: `precond list`, `precond show`, `precond compare`.

What a program might read goes to standard output, everything else to standard error. A mistake of
the user is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import precond
from precond.errors import PrecondError

USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C

Members = dict[str, str]

SHOWN = ("name", "title", "matrix", "repr", "solver", "axes", "formula", "summary", "options", "outer", "scope", "cost", "citation")


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake in one line instead of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except BrokenPipeError:  # `precond list | head` closed our output: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("precond: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (PrecondError, OSError) as error:
        print(f"precond: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="precond", description="Gradient preconditioning: matrices, representations, solvers, and methods made of them.")
    parser.add_argument("--version", action="version", version=f"precond {precond.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the members of an axis, the recipes, or the valid combinations")
    listing.add_argument("what", nargs="?", choices=[*_AXES, "recipes", "combinations"], help="default: the three axes and the recipes")
    listing.add_argument("--all", action="store_true", help="combinations: the refused ones too, with the reason")
    listing.add_argument("--json", action="store_true", help="for a program to read")
    listing.set_defaults(command=_list)

    show = commands.add_parser("show", help="a recipe: its triple, formula, defaults, cost and citation")
    show.add_argument("recipe", help="the name of a recipe, or a path to a TOML file")
    show.add_argument("--json", action="store_true", help="for a program to read")
    show.set_defaults(command=_show)

    from precond.compare.command import add_arguments

    compare = commands.add_parser("compare", help="train several methods on one task under one budget and report")
    add_arguments(compare)
    compare.set_defaults(command=_compare)
    return parser


def _compare(arguments: argparse.Namespace) -> int:
    from precond.compare.command import execute

    return execute(arguments)


# precond list


def _axis(registry: Any) -> Members:
    return {name: _described(registry.get(name)) for name in registry.names()}


def _recipes() -> Members:
    return {name: str(getattr(precond.load_recipe(name), "title", "")) for name in precond.recipes()}


_AXES: dict[str, Callable[[], Members]] = {
    "matrices": lambda: _axis(precond.matrices),
    "representations": lambda: _axis(precond.representations),
    "solvers": lambda: _axis(precond.solvers),
}


def _list(arguments: argparse.Namespace) -> int:
    if arguments.what == "combinations":
        return _combinations(every=arguments.all, as_json=arguments.json)
    sources = {**_AXES, "recipes": _recipes}
    sections = {name: sources[name]() for name in ([arguments.what] if arguments.what else sources)}
    if arguments.json:
        _print_json(sections[arguments.what] if arguments.what else sections)
        return 0
    for index, (name, members) in enumerate(sections.items()):
        if not arguments.what:
            print(("\n" if index else "") + name)
        _print_table([(member, line) for member, line in members.items()])
    return 0


def _combinations(*, every: bool, as_json: bool) -> int:
    cells = [cell for cell in precond.combinations() if every or cell.valid]
    if as_json:
        _print_json([{key: getattr(cell, key) for key in ("matrix", "repr", "solver", "valid", "reason")} for cell in cells])
        return 0
    rows = [(cell.matrix, cell.repr, cell.solver, *(["" if cell.valid else f"refused: {cell.reason}"] if every else [])) for cell in cells]
    _print_table([("MATRIX", "REPRESENTATION", "SOLVER", *([""] if every else [])), *rows])
    return 0


def _described(member: object) -> str:
    """The first sentence of a member's docstring, and what a matrix needs."""
    text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
    needs = getattr(member, "needs", None)
    return f"{text} [needs {needs}]" if needs else text


# precond show


def _show(arguments: argparse.Namespace) -> int:
    recipe = precond.load_recipe(arguments.recipe)
    shown = {key: value for key in SHOWN if (value := getattr(recipe, key, None)) not in (None, "", {}, ())}
    if arguments.json:
        _print_json(shown)
        return 0
    lines: list[tuple[str, str]] = []
    axes = shown.pop("axes", {})
    for key, value in {**shown, **axes}.items():  # with its options, an axis is shown in the place of its bare name
        values = [_in_words(value)]
        if key == "options":
            values = [f"{option} = {_in_words(setting)}" for option, setting in value.items()]
        lines += [(key if index == 0 else "", line) for index, line in enumerate(values)]
    _print_table(lines)
    return 0


def _in_words(value: Any) -> str:
    """Plain data of a recipe in one line: a table with a name as the call that it stands for."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}={_in_words(setting)}" for key, setting in value.items() if key != "name")
        return f"{value['name']}({inner})" if inner and "name" in value else str(value.get("name", inner))
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_words, value)) + "]"
    return " ".join(str(value).split())


# printing


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(value: dict[str, Any] | Members | Iterable[Any]) -> None:
    print(json.dumps(value, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(main())
