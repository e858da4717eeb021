"""What recipe files claim.

* A user's own TOML file, given by its path, is a recipe like any other; nothing but the file makes it one.
* What is wrong in a file is told by one sentence with the file, the line, and the nearest key or name: syntax, keys, members, options,
  types, values, missing keys, optimizers that do not exist, cells without meaning; lists and tables, where an option is one, by what they hold.
* A file is data: a value that looks like code is refused as a value, and nothing that it names is imported, called or reached.
* The loader holds no method's name: a method is its file. The packaged recipes are the files of `recipes/`.
"""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn

import precond
from precond.catalog import RecipeError

ROOT = Path(__file__).resolve().parents[1]
LINES = """\
title = "Mine"
formula = "d = (B + l I)^-1 G (A + l I)^-1"
summary = "A test."
citation = "Nobody"
cost = "none"
scope = "G"
damping = 1e-3
solver_interval = 5

[matrix]
name = "fisher_mc"
samples = 2

[repr]
name = "kron_io"
sharing = "reduce"

[solver]
name = "cholesky"

[history]
name = "Ema"
beta = 0.5

[[transforms]]
name = "KLClip"
bound = 0.25

[[transforms]]
name = "NormClip"
bound = 2

[optimizer]
name = "RMSprop"
lr = 0.5
""".splitlines()


def write(folder: Path, line: int = 0, text: str = "") -> Path:
    """The file above with one line (counted from 1) in another wording."""
    lines = [text if number == line else old for number, old in enumerate(LINES, start=1)]
    path = folder / "mine.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    """The sentence that refuses a file."""
    with pytest.raises(RecipeError) as caught:
        precond.load_recipe(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert text.endswith((".", ")"))
    return text


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path)
    recipe = precond.load_recipe(path)
    assert (recipe.name, recipe.title, recipe.matrix, recipe.repr, recipe.solver) == ("mine", "Mine", "fisher_mc", "kron_io", "cholesky")
    model = nn.Linear(2, 2)
    optimizer = recipe.optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.RMSprop)
    built = precond.recipe(str(path), solver="eigen")
    assert built.triple.matrix == precond.matrices.FisherMC(samples=2)
    assert built.triple.repr == precond.representations.KronIO(sharing="reduce")
    assert built.triple.solver.name == "eigen"
    assert built.options.history == precond.history.Ema(0.5)
    assert built.options.transforms == (precond.transforms.KLClip(0.25), precond.transforms.NormClip(2))
    criterion = nn.CrossEntropyLoss()
    built.attach(model, criterion, optimizer)
    criterion(model(torch.randn(4, 2)), torch.tensor([0, 1, 1, 0])).backward()
    optimizer.step()
    assert built.diagnostics["refreshes"] == 1
    assert "mine" not in precond.recipes()


@pytest.mark.parametrize(
    ("line", "text", "near"),
    [
        (7, "dampng = 1e-3", "did you mean 'damping'?"),
        (8, "solver_intervall = 5", "did you mean 'solver_interval'?"),
        (11, 'name = "fisher_mcc"', "did you mean 'fisher_mc'?"),
        (15, 'name = "kron_oi"', "did you mean 'kron_io'?"),
        (19, 'name = "choleski"', "did you mean 'cholesky'?"),
        (12, "sample = 2", "did you mean 'samples'?"),
        (16, 'shared = "reduce"', "did you mean 'sharing'?"),
        (22, 'name = "EMA"', "There are: Ema,"),
        (23, "betta = 0.5", "did you mean 'beta'?"),
        (26, 'name = "KLClp"', "did you mean 'KLClip'?"),
        (27, "bounds = 0.25", "did you mean 'bound'?"),
        (34, 'name = "RMSprp"', "did you mean 'RMSprop'?"),
        (34, 'name = "NoSuchOptimizer"', "There are: ASGD, "),
        (35, "learning_rate = 0.5", "There are: alpha, "),
        (33, "[optimiser]", "did you mean 'optimizer'?"),
    ],
)
def test_a_name_that_does_not_exist(tmp_path: Path, line: int, text: str, near: str) -> None:
    said = complaint(write(tmp_path, line, text))
    assert f", line {line}: " in said
    assert near in said


@pytest.mark.parametrize(
    ("line", "text", "says"),
    [
        (1, "title = 5", "text, in quotes"),
        (6, 'scope = "X"', "'L' (one mini-batch) or 'G'"),
        (7, 'damping = "1e-3"', "a number"),
        (7, "damping = -1.0", "at least 0"),
        (7, "damping = nan", "finite"),
        (7, "damping = [1e-3]", "a number"),
        (7, "damping = true", "a number"),
        (7, 'damping = {name = "Outside"}', "needs the option 'value'"),
        (8, 'solver_interval = "5"', "a number of steps"),
        (8, "solver_interval = 0", "at least 1 step"),
        (8, "solver_interval = 2.5", "a number of steps"),
        (8, "start_step = -1", "0 or more"),
        (8, 'before_start = "wait"', "'gradient' or 'nothing', not 'wait'"),
        (8, "transforms = 3", "[[transforms]]"),
        (11, "name = 3", "a table with a name"),
        (12, 'samples = "two"', "a whole number"),
        (12, "samples = 1.5", "a whole number"),
        (12, "samples = true", "a whole number"),
        (12, "samples = 0", "at least one label"),
        (16, 'sharing = "both"', "one of 'expand', 'reduce'"),
        (23, "beta = 2.0", "[0, 1)"),
        (23, 'beta = "half"', "a number"),
        (23, "", "needs the option 'beta'"),
        (35, 'lr = "fast"', "a number"),
        (35, "lr = -0.5", "Invalid learning rate"),
        (19, 'name = "elementwise"', "The nearest valid choice is"),
    ],
)
def test_a_value_of_the_wrong_kind(tmp_path: Path, line: int, text: str, says: str) -> None:
    if text.startswith("transforms"):  # instead of the tables below, not besides them
        path = tmp_path / "mine.toml"
        path.write_text("\n".join(text if n == line else old for n, old in enumerate(LINES, start=1) if not 25 <= n <= 31))
    else:
        path = write(tmp_path, line, text)
    said = complaint(path)
    assert says in said
    if "nearest valid" not in says:
        told = re.search(r", line (\d+): ", said)
        assert told is not None
        assert 0 <= line - int(told[1]) <= 2, "the line itself, or the head of its section"


SECTIONS = {
    "matrix": '[matrix]\nname = "batched_empirical_fisher"',
    "repr": '[repr]\nname = "kron_dim"',
    "solver": '[solver]\nname = "eigen"\npower = 0.5',
    "damping": '[damping]\nname = "PerFactor"\nvalue = 0.1',
    "history": '[history]\nname = "Sum"',
    "transforms": '[[transforms]]\nname = "Momentum"\nbeta = 0.9',
    "optimizer": '[optimizer]\nname = "Adam"',
}


def sections(folder: Path, section: str, *lines: str, **others: str) -> tuple[Path, int]:
    """A file of these sections, and the number of the last of the lines: they are added to one, or replace it where they name a member."""
    head = SECTIONS[section].splitlines()[:1] if lines[0].startswith("name") else SECTIONS[section].splitlines()
    made, number = list(LINES[:6]), 0
    for key, text in {**SECTIONS, **others}.items():
        made += [*head, *lines] if key == section else text.splitlines()
        if key == section:
            number = len(made)
    path = folder / "mine.toml"
    path.write_text("\n".join(made), encoding="utf-8")
    return path, number


@pytest.mark.parametrize(
    ("section", "line", "says"),
    [
        ("repr", "modes = 1", "a list of whole numbers or one of 'all', 'shortest', not 1"),
        ("repr", "modes = [0.5]", "a list of whole numbers"),
        ("repr", "modes = [[0]]", "a list of whole numbers"),
        ("repr", 'modes = {a = "all"}', "a list of whole numbers"),
        ("repr", 'modes = "shortst"', "one of 'all', 'shortest'"),
        ("repr", "mods = [0]", "did you mean 'modes'?"),
        ("damping", "only = 1", "a list of whole numbers, not 1"),
        ("damping", 'only = ["A"]', "a list of whole numbers, not ['A']"),
        ("damping", "only = [true]", "a list of whole numbers, not [True]"),
        ("damping", "onyl = [1]", "did you mean 'only'?"),
        ("history", "decay = [0.9]", "'decay' of 'Sum' is a number"),
        ("history", "decay = {beta = 0.9}", "'decay' of 'Sum' is a number"),
        ("history", "deca = 0.9", "did you mean 'decay'?"),
        ("transforms", 'place = "befor"', "one of 'before', 'after'"),
        ("transforms", "debias = 1", "true or false"),
        ("transforms", "[transforms.nested]", "did you mean 'nesterov'?"),
        ("optimizer", "betas = [0.9]", "a list of 2 numbers, not [0.9]"),
        ("optimizer", 'betas = ["a", "b"]', "a list of 2 numbers"),
        ("optimizer", "betas = 0.9", "a list of 2 numbers, not 0.9"),
        ("optimizer", "rows = 3", "There are: amsgrad, "),
    ],
)
def test_lists_and_tables_of_the_wrong_kind(tmp_path: Path, section: str, line: str, says: str) -> None:
    path, number = sections(tmp_path, section, line)
    said = complaint(path)
    assert says in said
    told = re.search(r", line (\d+): ", said)
    assert told is not None and (int(told[1]) == number or line.startswith("["))


@pytest.mark.parametrize(
    ("section", "lines", "says"),
    [
        ("history", ('name = "Sum"', "decay = 2.0"), "(0, 1]"),
        ("history", ('name = "Window"', "m = [3]"), "a whole number, not [3]"),
        ("history", ('name = "Window"', "m = 3", 'reduction = "medan"'), "one of 'mean', 'sum', 'padded', not 'medan'"),
        ("damping", ('name = "LevenbergMarquardt"', "value = 0.1", "factr = 0.5"), "did you mean 'factor'?"),
        ("solver", ('name = "newton_schulz"', "power = 0.5", 'coefficients = "muo"'), "one of 'muon' or a list of 3 numbers, not 'muo'"),
        ("solver", ('name = "newton_schulz"', "power = 0.5", "coefficients = [1, 2]"), "a list of 3 numbers, not [1, 2]"),
        ("repr", ('name = "full_sparse"', 'pattern = [["0"]]'), "a list of lists of whole numbers"),
        ("repr", ('name = "layer_sparse"', 'pattern = {"0" = "bais"}'), "or a table of such, not {'0': 'bais'}"),
        ("repr", ('name = "layer_sparse"', "pattern = 3"), "one of 'bias', 'unit', 'band', 'diagonal'"),
        ("matrix", ("name = {x = 1}",), "a name, or a table with a name and options"),
    ],
)
def test_options_of_other_members(tmp_path: Path, section: str, lines: tuple[str, ...], says: str) -> None:
    said = complaint(sections(tmp_path, section, *lines)[0])
    assert says in said
    assert re.search(r", line \d+: ", said)


@pytest.mark.parametrize(
    ("section", "lines"),
    [
        ("repr", ("modes = [0]",)),
        ("repr", ('modes = "shortest"',)),
        ("damping", ("only = [1, -1]",)),
        ("history", ("decay = 0.9", "initial = 1")),
        ("optimizer", ("betas = [0.5, 0.9]",)),
        ("solver", ('name = "newton_schulz"', "power = 0.5", "coefficients = [2, -1.5, 0.5]")),
    ],
)
def test_lists_are_options(tmp_path: Path, section: str, lines: tuple[str, ...]) -> None:
    assert precond.load_recipe(sections(tmp_path, section, *lines)[0]).solver in ("eigen", "newton_schulz")


def test_a_table_of_lists_is_an_option(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2, bias=False)), nn.MSELoss()  # of full rank, which classes are not
    lines = ('name = "layer_sparse"', 'pattern = {"0" = "unit", "2" = [[], [0], [0, 1], []]}')
    path, _ = sections(
        tmp_path, "repr", *lines, matrix='[matrix]\nname = "empirical_fisher"', solver='[solver]\nname = "sparse_cholesky"',
        damping='[damping]\nname = "Blockwise"\nvalue = 0.1', history='[history]\nname = "Local"',
    )  # fmt: skip
    optimizer = precond.load_recipe(path).optimizer(model.parameters())
    with precond.recipe(path).attach(model, criterion, optimizer) as preconditioner:
        criterion(model(torch.randn(6, 3)), torch.randn(6, 2)).backward()
        optimizer.step()
        inverse = preconditioner.operators["2"].to_dense().inverse()
    assert inverse[0, 1].abs() > 0 and inverse[3, :3].abs().max() < 1e-6 * inverse.abs().max()  # 1 has the parent 0, 3 none and no child


def test_a_key_of_a_model_is_no_key_of_a_recipe(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, 8, 'rows = {"0" = "flattened"}'))
    assert "line 8: 'rows' is no key of a recipe" in said and "There are: before_start, " in said


@pytest.mark.parametrize(("line", "text"), [(10, "[matrix"), (7, "damping = "), (19, "name = cholesky"), (14, "[matrix]"), (3, "\x00")])
def test_what_is_not_toml(tmp_path: Path, line: int, text: str) -> None:
    said = complaint(write(tmp_path, line, text))
    assert "is not TOML" in said
    assert f"line {line}" in said or f"line {line + 1}" in said


DEEP = ".".join(["x"] * 5000)
DIGITS = {"decimal": "9" * 400, "more than Python reads": "9" * 5000, "hexadecimal": "0x" + "F" * 9000, "just too large": str(2**63)}


@pytest.mark.parametrize("digits", DIGITS)
@pytest.mark.parametrize(("line", "text"), [(7, "damping = {}"), (8, "start_step = {}"), (12, "samples = {}"), (35, "lr = {}"), (35, "betas = [0.9, {}]")])
def test_a_whole_number_that_toml_does_not_have(tmp_path: Path, line: int, text: str, digits: str) -> None:
    said = complaint(write(tmp_path, line, text.format(DIGITS[digits])))
    assert "a whole number of more than 64 bits" in said and len(said) < 300
    assert f", line {line}: {text.split()[0]!r}" in said or digits == "more than Python reads"
    assert precond.load_recipe(write(tmp_path, 8, f"start_step = {2**63 - 1}")).options["start_step"] == 2**63 - 1


@pytest.mark.parametrize("text", ["start_step = " + "[" * 5000 + "]" * 5000, f"{DEEP} = 1", f"{DEEP} = {2**63}"], ids=["lists", "keys", "number"])
def test_what_lies_too_deep(tmp_path: Path, text: str) -> None:
    assert "too deep" in complaint(write(tmp_path, 8, text))


def test_no_number_is_no_learning_rate(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, 35, "lr = nan"))
    assert ", line 35: " in said and "'lr' of 'RMSprop' is a number, not nan" in said
    assert precond.load_recipe(write(tmp_path, 35, "lr = inf")).outer["lr"] == float("inf")


@pytest.mark.parametrize("key", ["title", "citation", "matrix", "repr", "solver"])
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    path = write(tmp_path)
    path.write_text(re.sub(rf"(?m)^(\[{key}\]\n(.+\n)*|{key} = .*\n)", "", path.read_text()))
    assert f"the key '{key}' is missing" in complaint(path)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (34, "name = \"__import__('os').system('echo hacked > /tmp/precond_hacked')\""),
        (34, 'name = "lr_scheduler"'),
        (34, 'name = "Optimizer"'),
        (34, 'name = "__class__"'),
        (22, 'name = "__builtins__"'),
        (22, 'name = "torch"'),
        (26, 'name = "os.system"'),
        (26, 'name = "Transform"'),
        (11, 'name = "builtins.eval"'),
        (8, 'solver_interval = "lambda step: True"'),
        (7, 'damping = {name = "torch.load", value = 1.0}'),
        (7, 'damping = "${HOME}"'),
        (27, '_known = ["x"]'),
        (27, '__class__ = "x"'),
    ],
)
def test_a_value_that_looks_like_code_is_only_a_wrong_value(tmp_path: Path, line: int, text: str) -> None:
    assert f", line {line}: " in complaint(write(tmp_path, line, text))


def test_what_is_no_file_of_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(RecipeError, match="there is no recipe file"):
        precond.load_recipe(path)
    path.write_bytes(b'title = "\xff\xfe"')
    assert "UTF-8" in complaint(path)
    with pytest.raises(precond.UnknownName, match="did you mean 'kfac'"):
        precond.load_recipe("kfc")
    for name in ("", "..", "../recipes/kfac", "kfac.py", "__init__"):
        with pytest.raises(precond.UnknownName, match=r"ends in \.toml"):
            precond.load_recipe(name)


def test_the_loader_holds_no_methods_name() -> None:
    names = [*precond.recipes(), *precond.matrices.names(), *precond.representations.names(), *precond.solvers.names()]
    assert len(precond.recipes()) == 54

    def held(text: str) -> list[str]:
        return [name for name in names if re.search(rf"\b{name}\b", text.lower())]

    for source in ("catalog.py", "plaindata.py"):
        tree = ast.parse((ROOT / "src/precond" / source).read_text(encoding="utf-8"))
        whole = ast.unparse(tree)
        for node in ast.walk(tree):  # docstrings may give examples
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        assert not held(ast.unparse(tree))
        assert source != "catalog.py" or {"kfac", "kron_io", "cholesky"} <= set(held(whole))  # its examples would be found


def test_the_packaged_recipes_are_the_files_of_the_repository() -> None:
    packaged = {f.name: f.read_bytes() for f in files("precond._recipes").iterdir() if f.name.endswith(".toml")}
    assert packaged == {f.name: f.read_bytes() for f in (ROOT / "recipes").glob("*.toml")}
