"""Claims about `repr="auto"`: each layer has the most faithful structure that the budget allows, and `describe()` says why.

- A large budget gives every layer the first candidate that hosts it, a small one the cheapest; the bytes held never exceed it.
- More budget is never less faithful; every layer takes the most faithful structure within one allowance, the largest that fits.
- The matrix of every block is that of the representation chosen; training equals training with the choice written out as overrides.
- A budget too small for the cheapest, and a cell that has no candidate, are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import nets
import precond
from precond import Auto
from precond.auto import CANDIDATES
from precond.errors import InvalidCombination

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()


def attached(model: nn.Module, **options: Any) -> tuple[precond.Preconditioner, torch.optim.Optimizer, nn.Module]:
    options = {"matrix": "ggn", "repr": "auto", "solver": "eigen", "damping": 0.1, **options}
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    return precond.Preconditioner(**options).attach(model, criterion, optimizer), optimizer, criterion


def chosen(budget: float, **options: Any) -> dict[str, str]:
    preconditioner, _, _ = attached(network(), repr=Auto(budget=budget), **options)
    return {row.block: row.triple.split(" x ")[1] for row in preconditioner.describe().rows}


def test_much_is_the_most_faithful_and_little_the_cheapest() -> None:
    assert chosen(10**9) == {"0": "layer", "1": "layer", "3": "layer", "5": "layer"}
    little = chosen(2.0)
    assert set(little.values()) == {"diagonal"}
    assert len(little) == 7  # each parameter is a block of its own
    middle = chosen(12.0)
    assert middle["0"] in ("kron_eigen", "kron_io")
    assert middle["5"] == "layer"


@pytest.mark.parametrize("solver", ["eigen", "cholesky", "elementwise"])
def test_more_budget_is_never_less_faithful_and_none_is_exceeded(solver: str) -> None:
    before: dict[str, int] = {}
    P = sum(p.numel() for p in network().parameters())
    for budget in (2.0, 4.0, 8.0, 16.0, 40.0, 400.0):
        preconditioner, optimizer, criterion = attached(network(), repr=Auto(budget=budget), solver=solver)
        rows = preconditioner.describe().rows
        level = {row.parameter: CANDIDATES.index(row.triple.split(" x ")[1]) for row in rows}
        assert all(level[name] <= old for name, old in before.items())
        before = level
        for row in rows:
            assert "auto:" in row.note
        model = preconditioner._session.model  # type: ignore[union-attr]
        criterion(model(nets.normal(8, 12, seed=1)), nets.labels(3, 8)).backward()
        optimizer.step()
        assert sum(row.bytes for row in preconditioner.describe().rows) <= budget * P * 8 * 1.1 + 2000  # counters and weights of averages


def test_the_note_says_what_the_next_better_one_would_take() -> None:
    preconditioner, _, _ = attached(network(), repr=Auto(budget=24.0))
    notes = {row.parameter: row.note for row in preconditioner.describe().rows}
    assert notes["0.weight"].endswith("'layer' would take 1,081,600")  # 2 * 260^2 numbers of 8 bytes
    assert notes["5.weight"].endswith("the most faithful there is")


def test_training_is_that_of_the_choice_written_out() -> None:
    model, other = network(), network()
    preconditioner, optimizer, criterion = attached(model, repr=Auto(budget=12.0))
    choice = {row.block: row.triple.split(" x ")[1] for row in preconditioner.describe().rows}
    _, again, its = attached(other, repr="layer", overrides={name.rpartition(".")[0] or name: {"repr": r} for name, r in choice.items()})
    x, y = nets.normal(8, 12, seed=1), nets.labels(3, 8)
    for _ in range(3):
        for net, opt, loss in ((model, optimizer, criterion), (other, again, its)):
            opt.zero_grad()
            loss(net(x), y).backward()
            opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p, q)


def test_curvature_takes_it_too() -> None:
    model, x, y = network(), nets.normal(8, 12, seed=1), nets.labels(3, 8)
    ask = partial(precond.curvature, model, nn.CrossEntropyLoss(), x, y, matrix="ggn")
    close(ask(repr=Auto(budget=10**9)).to_dense(), ask(repr="layer").to_dense())
    close(ask(repr=Auto(candidates=("unit", "diagonal"), budget=10**9)).to_dense(), ask(repr="unit").to_dense())


def test_overrides_change_the_choice_of_a_layer_and_the_matrix_of_all() -> None:
    preconditioner, _, _ = attached(network(), repr=Auto(budget=10**9), overrides={"0": {"repr": "diagonal"}, "3": {"matrix": "hessian"}})
    triples = {row.parameter: row.triple for row in preconditioner.describe().rows}
    assert triples["0.weight"].startswith("ggn x diagonal")
    assert triples["3.weight"].startswith("hessian x layer")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidCombination, match="the cheapest structures of all layers need"):
        attached(network(), repr=Auto(budget=100))
    with pytest.raises(InvalidCombination, match="have no cell with any of 'kron_io'"):
        precond.Preconditioner(matrix="hessian", repr=Auto(candidates=("kron_io",)), solver="eigen")
    for bad in (0, -1.0, True, "much"):
        with pytest.raises(ValueError, match="budget="):
            Auto(budget=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name at least one"):
        Auto(candidates=())
