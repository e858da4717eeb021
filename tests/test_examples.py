"""What the examples claim: `examples/compose.py` trains three cells that are no recipe's, and each of them learns."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

import precond

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def compose() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compose", EXAMPLES / "compose.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_recipe_has_a_composed_cell(compose: ModuleType) -> None:
    published = {(r.matrix, r.repr, r.solver) for r in map(precond.load_recipe, precond.recipes())}
    triples = [make().triple for make in compose.COMPOSED]
    composed = {(t.matrix.name, t.repr.name, t.solver.name) for t in triples}
    assert len(composed) == 3
    assert not composed & published


def test_composed_cells_learn(compose: ModuleType) -> None:
    losses = compose.main(["--steps", "20"])
    assert len(losses) == 4
    assert all(loss < 0.8 * math.log(10) for loss in losses.values()), losses
