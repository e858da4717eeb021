"""Claims about the pages in docs/: every block of Python in them runs, one after another, and what they define is right.

- So does the section of the README on Hugging Face, and it observes every step.
- `recipes.md` is what `docs/recipes.py` makes of the recipe files, and the README names all of them.
- The blocks of a page share one namespace; registries and the random state are put back afterwards.
- The layers of `layers.md` have the oracle's matrix by their registered rules, as by the generic one.
- The Poisson likelihood of `likelihoods.md` has autograd's gradient and Hessian, its draws have them as mean and covariance by enumeration,
  and `precond.curvature` with it is the oracle's, for every reduction.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dense
import precond
from nets import labels, normal, seeded
from precond import layers
from precond.layers import registration
from precond.likelihoods import exact_columns
from training import net

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text())
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    axes = [axis.REGISTRY for axis in (precond.likelihoods, precond.matrices, precond.representations, precond.solvers)]
    saved = [dict(registry._members) for registry in axes]
    rules = dict(registration._RULES)
    with torch.random.fork_rng(devices=[]):
        yield
    registration._RULES.clear()
    registration._RULES.update(rules)
    for registry, members in zip(axes, saved, strict=True):
        registry._members.clear()
        registry._members.update(members)


def run(page: Path, section: str = "") -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": page.stem}
    text = page.read_text()
    start = text.index(section)
    end = text.find("\n## ", start + 1) if section else len(text)
    for block in re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE).finditer(text, start, end):
        padding = "\n" * text[: block.start(1)].count("\n")  # so that a traceback has the line of the page
        exec(compile(padding + block.group(1), page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path) -> None:
    torch.manual_seed(0)
    assert run(page)


def test_the_page_on_representations_has_them_all_and_what_it_says_of_three_ways_to_a_rank_holds() -> None:
    table = (DOCS / "representations.md").read_text().split("## Few rows")[0]
    assert {name for name in precond.representations.names() if f"`{name}`" not in table} == set()
    torch.manual_seed(0)
    found = run(DOCS / "representations.md")
    data = (found["model"], found["criterion"], found["inputs"], found["targets"])
    M = precond.curvature(*data, matrix="ggn", repr="full").to_dense()
    best, sketch = ((found[name].to_dense() - M).norm() for name in ("best", "sketch"))
    assert best <= sketch * (1 + 1e-6) and sketch < 1.5 * best
    assert best > 1e-3 * M.norm()
    assert found["newton"].blocks["model"].rank >= 5


def test_the_hugging_face_section_of_the_readme_runs() -> None:
    torch.manual_seed(0)
    assert run(DOCS.parent / "README.md", "## Hugging Face\n")["preconditioner"].diagnostics["observations"] == 3


def test_the_section_of_the_readme_on_failures_runs_and_what_it_shows_is_right() -> None:
    torch.manual_seed(0)
    found = run(DOCS.parent / "README.md", "## When something goes wrong\n")
    C, spectrum = found["preconditioner"].operator("0", damped=True).to_dense(), found["spectrum"]
    assert found["preconditioner"].diagnostics["refreshes"] == 6
    torch.testing.assert_close(spectrum.values, torch.linalg.eigvalsh(C), rtol=1e-3, atol=1e-5)
    text = (DOCS.parent / "README.md").read_text()
    assert all(name in text for name in ("retries_float64", "blocks_kept", "directions_zeroed")) and "refreshes" in found["preconditioner"].diagnostics


@pytest.mark.parametrize(("name", "repr"), [("Blend", "layer"), ("Rolled", "layer"), ("Rolled", "unit")])
def test_the_layers_of_the_page_are_exact(name: str, repr: str) -> None:
    layer = run(DOCS / "layers.md")[name]
    model = seeded(lambda: nn.Sequential(layer(4) if name == "Blend" else layer(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    assert layers.resolve_rule(model[0]) is not layers.GENERIC
    x, y = normal(5, 4), labels(3, 5)
    M = dense.ggn(model, nn.CrossEntropyLoss(), x, y)
    want = dense.project_layer(M, model) if repr == "layer" else dense.project_unit(M, model)
    close(precond.curvature(model, nn.CrossEntropyLoss(), x, y, matrix="ggn", repr=repr).to_dense(), want)


@pytest.fixture
def poisson() -> Any:
    return run(DOCS / "likelihoods.md")["Poisson"]


COUNTS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 0.0], [2.0, 0.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_poisson_likelihood_is_exact(poisson: Any, reduction: str) -> None:
    f, criterion = normal(4, 3), nn.PoissonNLLLoss(reduction=reduction)
    likelihood = precond.likelihoods.resolve(criterion)
    assert isinstance(likelihood, poisson)
    scale, v = likelihood.scale(f, COUNTS), normal(4, 3, seed=2)
    close(scale * likelihood.gradient(f, COUNTS), torch.func.grad(lambda f: criterion(f, COUNTS))(f))
    H = torch.func.hessian(lambda flat: criterion(flat.view(4, 3), COUNTS))(f.flatten())
    close((scale * likelihood.hessian_product(f, COUNTS, v)).flatten(), H @ v.flatten())
    columns = exact_columns(likelihood, f, COUNTS, 4).reshape(-1, 4, 3)
    close(torch.block_diag(*(scale * torch.einsum("kni,knj->nij", columns, columns))), H)
    rate, k = f.exp(), torch.arange(60, dtype=torch.float64).view(-1, 1, 1)
    p = (k * f - rate - torch.lgamma(k + 1)).exp()
    close((p * likelihood.gradient(f, k)).sum(0), torch.zeros_like(f))
    close(scale * (p * likelihood.gradient(f, k).square()).sum(0), H.diagonal().view(4, 3))
    drawn = rate - likelihood.sample(f, COUNTS, torch.Generator().manual_seed(0))
    close(drawn, drawn.round())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("matrix", ["ggn", "fisher", "hessian"])
@pytest.mark.parametrize("repr", ["full", "matrix_free"])
def test_curvature_with_the_poisson_likelihood_is_the_oracles(poisson: Any, repr: str, matrix: str, reduction: str) -> None:
    x, given = normal(4, 4), nn.PoissonNLLLoss(reduction="mean" if reduction == "none" else reduction)
    want = getattr(dense, "hessian" if matrix == "hessian" else "ggn")(net(), given, x, COUNTS)
    got = precond.curvature(net(), nn.PoissonNLLLoss(reduction=reduction), x, COUNTS, matrix=matrix, repr=repr)
    close(got.to_dense(), want)


def test_an_option_the_poisson_likelihood_does_not_model_is_refused(poisson: Any) -> None:
    with pytest.raises(precond.ObservationError, match=r"PoissonNLLLoss\(log_input=False\) is not modelled"):
        precond.likelihoods.resolve(nn.PoissonNLLLoss(log_input=False))


def test_the_page_of_recipes_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipes_page", DOCS / "recipes.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == (DOCS / "recipes.md").read_text(encoding="utf-8"), "run python docs/recipes.py"


def test_the_readme_names_every_member() -> None:
    table = (DOCS.parent / "README.md").read_text(encoding="utf-8").partition("## What exists today")[2]
    for row, names in {
        "matrices": precond.matrices.names(), "representations": precond.representations.names(), "solvers": precond.solvers.names(),
        "recipes": precond.recipes(),
    }.items():  # fmt: skip
        line = next(line for line in table.splitlines() if line.startswith(f"| {row} "))
        assert set(re.findall(r"`(\w+)`", line)) - {"auto"} == set(names), row
