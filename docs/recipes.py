"""Writes `docs/recipes.md` from the recipe files: run `python docs/recipes.py` after adding one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a checkout that is not installed

import precond


def page() -> str:
    """The page: one section for each recipe, in the order of the alphabet."""
    found = [precond.load_recipe(name) for name in precond.recipes()]
    lines = [
        "# Recipes",
        "",
        "Written by `docs/recipes.py` from the files of `recipes/`. `precond show NAME` prints one with all its options. How each of them does with its",
        "defaults, beside tuned SGD: [benchmarks/recipes.md](benchmarks/recipes.md).",
        "",
        "| recipe | matrix | representation | solver | over |",
        "|---|---|---|---|---|",
    ]
    over = {"L": "one batch", "G": "several steps"}
    lines += [f"| [{r.name}](#{r.name}) | `{r.matrix}` | `{r.repr}` | `{r.solver}` | {over[r.scope]} |" for r in found]
    for r in found:
        lines += ["", f"## {r.name}", "", f"**{r.title}.** {r.summary}", "", f"    {r.formula}", "", f"Cost: {r.cost}.", "", f"{r.citation}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
