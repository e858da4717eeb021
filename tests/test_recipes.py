"""What recipes claim, end to end.

* Every recipe has a reference in `tests/references`, and its steps equal the reference's, computed densely in float64 from the paper.
* Options that make the difference (intervals, clip, warm start; of each recipe at least one) do make one on these problems: a wrong one would be seen.
* The outer update is a stock `torch.optim` class; every argument of the preconditioner and of the optimizer can be overridden.
* A batch of NaN moves no parameter and does not stop K-FAC, whose labels are drawn from what the model says.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond.matrices import BatchedFisherMC, FisherMC
from precond.solvers import PSGD
from references.common import NETWORKS, Drawn, Network, theta


def reference(name: str) -> ModuleType:
    return importlib.import_module(f"references.{name}")


def written() -> list[str]:
    """The recipes that have a reference."""
    return [name for name in precond.recipes() if (Path(__file__).parent / "references" / f"{name}.py").is_file()]


def cases() -> list[tuple[str, str, str]]:
    found = []
    for name in written():
        module = reference(name)
        for variant in module.VARIANTS:
            found += [(name, variant, net) for net in getattr(module, "ONLY", {}).get(variant, module.NETS)]
    return found


_MEMBERS = ("matrix", "repr", "solver", "history", "damping")
_AXES: dict[str, Any] = {"matrix": precond.matrices, "repr": precond.representations, "solver": precond.solvers}


def overrides(recipe: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The overrides of a variant, where a table of plain data changes the options of the recipe's own member.

    With a "name" the table is that of a recipe file, which replaces the member: `{"history": {"name": "Sum", "initial": 1e-2}}`. So are
    those of the list of transforms.
    """
    made = dict(arguments)
    if any(isinstance(spec, dict) for spec in made.get("transforms", [])):
        made["transforms"] = [
            getattr(precond.transforms, spec["name"])(**{k: v for k, v in spec.items() if k != "name"}) for spec in made["transforms"]
        ]
    built = precond.recipe(recipe)
    for key in _MEMBERS:
        if isinstance(made.get(key), dict):
            options = dict(made[key])
            own = built.options.history if key == "history" else getattr(built.triple, key)
            if "name" in options:
                name = options.pop("name")
                made[key] = (_AXES[key].get(name) if key in _AXES else getattr(getattr(precond, key), name))(**options)
            else:
                made[key] = dataclasses.replace(own, **options)
    return made


def train(recipe: str, network: Network, steps: int, **arguments: Any) -> Tensor:
    """(steps, P): theta after every step of the ordinary loop."""
    model, path = network.make(), []
    optimizer = precond.load_recipe(recipe).optimizer(model.parameters())
    with precond.recipe(recipe, seed=3, **arguments).attach(model, network.criterion, optimizer):
        for inputs, targets in network.batches(steps):
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            optimizer.step()
            path.append(theta(model))
    return torch.stack(path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What the run draws: the labels of sampled matrices (the class at which p - e_label is negative), and the probes."""
    record = Drawn()

    def spy_on(matrix: type[FisherMC] | type[BatchedFisherMC]) -> None:
        original: Callable[..., Tensor] = matrix.cotangents

        def spy(self: Any, context: Any) -> Tensor:
            cotangents = original(self, context)
            assert cotangents.shape[0] == 1
            assert ((cotangents[0] < 0).sum(1) == 1).all()
            record.labels.append(cotangents[0].argmin(1))
            return cotangents

        monkeypatch.setattr(matrix, "cotangents", spy)

    def draw(like: Any, distribution: Any, samples: int, key: Any) -> Any:
        vectors = original_draw(like, distribution, samples, key)
        record.probes.append(torch.cat([v.flatten(1) for v in vectors.values()], 1))
        return vectors

    probes = importlib.import_module("precond.observe.probes")  # the package has a function of that name
    original_draw = probes._draw
    monkeypatch.setattr(probes, "_draw", draw)
    for matrix in (FisherMC, BatchedFisherMC):
        spy_on(matrix)
    _spy_on_psgd(monkeypatch, record)
    _spy_on_sketches(monkeypatch, record)
    return record


def _spy_on_sketches(monkeypatch: pytest.MonkeyPatch, record: Drawn) -> None:
    module = importlib.import_module("precond.representations.layer_gram")
    original = module.draw

    def noted(*arguments: Any) -> dict[str, Any]:
        statistics: dict[str, Any] = original(*arguments)
        suffix = module.CHOSEN
        record.coordinates.append({name.removesuffix(suffix): x for name, x in statistics.items() if name.endswith(suffix)})
        return statistics

    monkeypatch.setattr(module, "draw", noted)


def _spy_on_psgd(monkeypatch: pytest.MonkeyPatch, record: Drawn) -> None:
    """Noted from the first probes on, since a cell is tried on a specimen before."""
    low_rank = importlib.import_module("precond.solvers.psgd_low_rank")
    noise, start, learn = PSGD._noise, low_rank.start, low_rank.learn

    def noted_noise(self: Any, pairs: Any, count: int) -> Tensor:
        drawn = noise(self, pairs, count)
        record.noise += [drawn] if record.probes else []
        return drawn

    def noted_start(*arguments: Any) -> dict[str, Any]:
        Q: dict[str, Any] = start(*arguments)
        record.factors += [(Q["U"], Q["V"])] if record.probes else []
        return Q

    def noted_learn(*arguments: Any, U_moves: bool) -> dict[str, Any]:
        record.moves += [U_moves] if record.probes else []
        Q: dict[str, Any] = learn(*arguments, U_moves=U_moves)
        return Q

    monkeypatch.setattr(PSGD, "_noise", noted_noise)
    monkeypatch.setattr(low_rank, "start", noted_start)
    monkeypatch.setattr(low_rank, "learn", noted_learn)


def test_every_recipe_has_a_reference() -> None:
    assert written() == precond.recipes()
    assert all(getattr(reference(name), "CONTROLS", ()) for name in written())


@pytest.mark.parametrize(("name", "variant", "net"), [pytest.param(*case, id="-".join(case)) for case in cases()])
def test_steps_equal_the_dense_ones(name: str, variant: str, net: str, drawn: Drawn) -> None:
    module, network = reference(name), NETWORKS[net]
    ours, theirs = module.VARIANTS[variant]
    path = train(name, network, module.STEPS, **overrides(name, ours))
    expected = module.train(network, network.batches(module.STEPS), drawn, **theirs)
    assert module.STEPS >= 5
    torch.testing.assert_close(path, expected, rtol=module.TOLERANCE, atol=module.TOLERANCE)


@pytest.mark.parametrize(
    ("name", "other"),
    [pytest.param(name, other, id=f"{name}-{'-'.join(other)}") for name in written() for other in getattr(reference(name), "CONTROLS", ())],
)
def test_a_wrong_option_would_be_seen(name: str, other: dict[str, Any], drawn: Drawn) -> None:
    module = reference(name)
    network = NETWORKS[module.NETS[0]]
    path = train(name, network, module.STEPS)
    wrong = module.train(network, network.batches(module.STEPS), drawn, **other)
    assert (path - wrong).abs().max() > 1e3 * module.TOLERANCE


def test_newton_lands_on_the_minimum_of_a_quadratic() -> None:
    network = NETWORKS["linear"]
    inputs, targets = network.batch(0)
    with_one = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    solution = torch.linalg.lstsq(with_one, targets).solution.T  # [W, b]
    path = train("newton", network, 1, damping=0.0)
    torch.testing.assert_close(path[0], torch.cat([solution[:, :-1].flatten(), solution[:, -1]]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", precond.recipes())
def test_the_outer_update_is_a_stock_optimizer(name: str) -> None:
    recipe = precond.load_recipe(name)
    model = nn.Linear(2, 2)
    optimizer = recipe.optimizer(model.parameters())
    assert type(optimizer).__module__.startswith("torch.optim")
    assert type(optimizer) is getattr(torch.optim, recipe.outer["name"])
    for option, value in recipe.outer.items():
        assert option == "name" or optimizer.param_groups[0][option] == value
    changed = recipe.optimizer([{"params": [model.weight]}, {"params": [model.bias], "lr": 7.0}], lr=0.25, weight_decay=0.5)
    assert [group["lr"] for group in changed.param_groups] == [0.25, 7.0]
    assert {group["weight_decay"] for group in changed.param_groups} == {0.5}


@pytest.mark.parametrize("name", precond.recipes())
def test_a_recipe_says_what_it_is(name: str) -> None:
    recipe, built = precond.load_recipe(name), precond.recipe(name)
    assert (recipe.matrix, recipe.repr, recipe.solver) == (built.triple.matrix.name, built.triple.repr.name, built.triple.solver.name)
    assert recipe.scope in ("L", "G")
    assert all(getattr(recipe, key) for key in ("title", "formula", "summary", "citation", "cost"))


def test_any_argument_can_be_overridden() -> None:
    arguments: dict[str, Any] = {
        "matrix": "ggn", "repr": precond.representations.get("kron_io")(sharing="reduce"), "solver": "eigen",
        "damping": precond.damping.Tikhonov(0.5), "transforms": [], "history": "local", "curvature_interval": 2,
        "solver_interval": lambda step: step == 0, "start_step": 3, "overrides": {"0": None}, "strict": True, "loss_weights": "given",
        "on_nonfinite": "skip", "seed": 11, "rows": {"2": "flattened"}, "self_check": False,
    }  # fmt: skip
    changed = precond.recipe("kfac", **arguments)
    assert (changed.triple.matrix.name, changed.triple.solver.name) == ("ggn", "eigen")
    assert changed.triple.repr.sharing == "reduce"  # type: ignore[attr-defined]
    assert changed.triple.damping == precond.damping.Tikhonov(0.5)
    assert (changed.options.transforms, changed.options.history) == ((), precond.history.Local())
    options = changed.options
    assert [options.curvature.due(step) for step in range(3)] == [True, False, True]
    assert [options.solver.due(step) for step in range(3)] == [True, False, False]
    assert (options.start_step, options.overrides, options.strict, changed.seed) == (3, {"0": None}, True, 11)
    assert (options.loss_weights, options.on_nonfinite, options.rows, options.self_check) == ("given", "skip", {"2": "flattened"}, False)
    assert precond.recipe("kfac").triple.matrix.name == "fisher_mc", "the recipe itself is unchanged"


def test_an_argument_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="dampening"):
        precond.recipe("kfac", dampening=1e-2)


def test_a_batch_of_nan_does_not_stop_kfac() -> None:
    network = NETWORKS["mlp"]
    model = network.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = precond.recipe("kfac", solver_interval=1, seed=0).attach(model, network.criterion, optimizer)
    path = []
    for step, (inputs, targets) in enumerate(network.batches(5)):
        optimizer.zero_grad()
        network.criterion(model(inputs * float("nan") if step == 2 else inputs), targets).backward()
        optimizer.step()
        path.append(theta(model))
    assert torch.equal(path[2], path[1])
    assert not torch.equal(path[3], path[2])
    assert all(bool(at.isfinite().all()) for at in path)
    assert preconditioner.diagnostics["observations_dropped"] == 3
    assert preconditioner.diagnostics["directions_zeroed"] == 3
