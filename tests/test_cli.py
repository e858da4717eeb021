"""What the command line claims: what it lists and shows of every recipe, that a mistake is one line and exit code 2, that JSON parses."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import precond
from precond.cli import main


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The one line that a wrong command prints."""
    try:
        code = main(arguments)
    except SystemExit as leave:  # argparse's own way out
        code = leave.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


@pytest.mark.parametrize("axis", ["matrices", "representations", "solvers"])
def test_an_axis_is_listed_a_member_a_line(axis: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", axis]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == getattr(precond, axis).names()
    assert all(len(line.split()) > 1 for line in lines), "a member without a docstring"


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "recipes", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(precond.recipes())


def test_list_alone_shows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["matrices", "representations", "solvers", "recipes"]


def test_combinations_are_the_valid_cells_unless_all_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    cells = precond.combinations()
    main(["list", "combinations", "--json"])
    valid = json.loads(capsys.readouterr().out)
    main(["list", "combinations", "--json", "--all"])
    every = json.loads(capsys.readouterr().out)
    assert len(valid) == sum(cell.valid for cell in cells)
    assert len(every) == len(cells)
    assert all(cell["reason"] for cell in every if not cell["valid"])
    main(["list", "combinations"])
    assert len(capsys.readouterr().out.splitlines()) == len(valid) + 1


def test_a_recipe_is_shown_with_its_triple(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = precond.load_recipe("kfac")
    assert main(["show", "kfac", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["matrix"], shown["repr"], shown["solver"]) == (str(recipe.matrix), str(recipe.repr), str(recipe.solver))
    assert main(["show", "kfac"]) == 0
    text = capsys.readouterr().out
    assert recipe.citation.split()[0] in text


@pytest.mark.parametrize("name", precond.recipes())
def test_every_recipe_is_shown_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = precond.load_recipe(name)
    assert main(["show", name, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    keys = ("title", "formula", "summary", "citation", "cost", "scope")
    assert {key: shown[key] for key in keys} == {key: getattr(recipe, key) for key in keys}
    assert (shown["axes"], shown["outer"], shown.get("options", {})) == (recipe.axes, recipe.outer, recipe.options)
    assert main(["show", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [" ".join(line.split()) for line in lines]
    for key in keys:
        assert f"{key} {' '.join(getattr(recipe, key).split())}" in words
    for key, spec in {**recipe.axes, "outer": recipe.outer}.items():
        (line,) = [line for line in words if line.startswith(f"{key} {spec['name']}")]
        assert all(f"{option}=" in line for option in spec if option != "name")
    assert all(any(f"{option} = " in line for line in words) for option in recipe.options)


def test_the_list_of_recipes_is_a_line_each_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == precond.recipes()
    assert all(len(line.split()) > 1 for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "kfca"],
        ["show", "no/such/file.toml"],
        ["list", "nothing"],
        ["nothing"],
        ["compare", "--contenders", "kfca"],
        ["compare", "--contenders", "kfac:no_such_option=1"],
        ["compare", "--task", "digit"],
        ["compare", "--seeds", "0"],
        ["compare", "--seeds", "many"],
        ["compare", "--batch-size", "0"],
        ["compare", "--epochs", "0"],
        ["compare", "--device", "abacus"],
        ["compare", "--grid", "0"],
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: " in refused(capsys, arguments)


def test_a_name_that_is_nearly_right_is_answered_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "kfac" in refused(capsys, ["compare", "--contenders", "kfca"])
    assert "digits_mlp" in refused(capsys, ["compare", "--task", "digits_mpl"])


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, ["compare", "--out", str(tmp_path / "file" / "out")])


def test_a_missing_package_is_one_line_that_says_how_to_get_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install" in refused(capsys, ["compare"])


def test_importing_the_package_loads_nothing_of_the_comparison() -> None:
    program = "import sys, precond; print([m for m in sys.modules if m.split('.')[0] in ('sklearn', 'matplotlib', 'rich')])"
    program += "; print([m for m in sys.modules if m.startswith('precond.compare')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "precond", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("precond ")
