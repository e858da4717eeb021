"""What `benchmarks/recipes.py` claims of its file: finished searches are read back as they were, and an interruption of a write loses none."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "recipes.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_recipes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_recipes"] = module  # where its dataclasses look up their types
    spec.loader.exec_module(module)
    return module


def test_searches_are_kept(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    rows = [script.Best("sgd", "logistic", 0.25, 0.1), script.Best("bfgs", "autoencoder", math.inf, 0.1, 35)]
    script._save(path, rows)
    assert script._load(path) == rows
    assert [row["loss"] for row in json.loads(path.read_text())] == [0.25, None]
    write = Path.write_text

    def interrupted(self: Path, text: str, *arguments: Any) -> int:
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script._save(path, [*rows, script.Best("adam", "logistic", 0.125, 0.1)])
    assert script._load(path) == rows
    with pytest.raises(KeyboardInterrupt):  # written in place, it would be lost
        path.write_text(json.dumps([{}] * 9))
    with pytest.raises(json.JSONDecodeError):
        script._load(path)
