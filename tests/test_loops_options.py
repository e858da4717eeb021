"""Claims about the options of a preconditioner, in training:

- an override by glob, class or module changes the cell or the damping of the layers it matches, the last match wins, None leaves the
  gradient raw; one that matches nothing, or has an unknown option, is refused with the names there are;
- `strict` refuses what falls back otherwise, by name; `describe()` lists every trainable parameter; the chain of fallbacks; no warning of what
  the user asked for;
- before `start_step` the gradient is raw and statistics are gathered;
- the intervals, as numbers or functions of the step, say when the matrix is observed and when the solver refreshes; on other steps there is
  no layer hook; what depends on the criterion is not asked for one then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nets import CASES
from precond import InvalidCombination, UsageError
from training import EXACT, LR, batches, differ, fit, gradient, make, move, net, of, plain, same, sgd, solve, theta


def stepped(blocks: dict[tuple[int, int], tuple[str, float] | None], steps: int = 3) -> nn.Module:
    """Dense training with a matrix and damping for each range of parameters; None: the raw gradient."""
    model = net()
    for x, y in batches(steps):
        g = gradient(model, x, y)
        step = g.clone()
        for place, cell in blocks.items():
            at = slice(*place)
            if cell is not None:
                C = of(cell[0])(model, x, y)[at, at]
                step[at] = solve(C, cell[1], g[at])
        move(model, -LR * step)
    return model


def by_module() -> nn.Module:
    """An override needs the very module that is trained."""
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    make(repr="layer", overrides={model[0]: None}).attach(model, criterion, optimizer)
    for x, y in batches():
        plain(model, criterion, optimizer, x, y)
    return model


def test_an_override_of_none_leaves_the_raw_gradient() -> None:
    expected = stepped({(0, 25): None, (25, 43): ("ggn", 0.1)})
    same(fit(make(repr="layer", overrides={"0": None})), expected)
    same(by_module(), expected)


@pytest.mark.parametrize("key", ["0", "[0-1]", nn.Linear, "*"], ids=str)
def test_an_override_changes_cell_and_damping_of_what_it_matches(key: Any) -> None:
    ours = fit(make(repr="layer", overrides={key: {"matrix": "empirical_fisher", "damping": 0.5}}))
    rest = ("empirical_fisher", 0.5) if key in (nn.Linear, "*") else ("ggn", 0.1)
    same(ours, stepped({(0, 25): ("empirical_fisher", 0.5), (25, 43): rest}))


def test_the_last_override_that_matches_wins() -> None:
    ours = fit(make(repr="layer", overrides={"*": None, "2": {"damping": 0.5}}))
    same(ours, stepped({(0, 25): None, (25, 43): ("ggn", 0.5)}))


def test_an_override_of_representation_and_solver() -> None:
    preconditioner = make(repr="kron_io", overrides={"2": {"repr": "diagonal", "solver": "elementwise"}})
    fit(preconditioner, steps=1)
    kinds = {name: C.kind for name, C in preconditioner.operators.items()}
    assert kinds.pop("0") == "Kronecker"
    assert kinds and set(kinds.values()) == {"Diagonal"}


@pytest.mark.parametrize("key", ["9", "layer*", nn.Conv2d, nn.Linear(2, 2)], ids=lambda k: str(k)[:10])
def test_an_override_that_matches_nothing_is_refused(key: Any) -> None:
    with pytest.raises(UsageError, match=r"matches no layer with trainable parameters\. The layers are: '0', '2'\."):
        make(overrides={key: None}).attach(net(), nn.CrossEntropyLoss())


def test_an_override_of_another_kind_or_with_an_unknown_option_is_refused() -> None:
    with pytest.raises(UsageError, match="a module-name glob, a module class or a module, not by 3"):
        make(overrides={3: None}).attach(net(), nn.CrossEntropyLoss())
    with pytest.raises(InvalidCombination, match="an override has the options matrix, repr, solver, damping, not history"):
        make(overrides={"0": {"history": 0.9}}).attach(net(), nn.CrossEntropyLoss())


def test_an_invalid_cell_in_an_override_is_refused() -> None:
    with pytest.raises(InvalidCombination, match="nearest valid choice"):
        make(overrides={"0": {"matrix": "hessian", "repr": "kron_io"}}).attach(net(), nn.CrossEntropyLoss())


def test_strict_refuses_the_fallback_that_describe_shows() -> None:
    model = CASES["transformer"].make()
    with pytest.raises(InvalidCombination, match=r"'kron_io' cannot host layer '\w+' \(\w+\).*strict=False for the fallback"):
        make(repr="kron_io", strict=True).attach(model, nn.CrossEntropyLoss())
    table = make(repr="kron_io").attach(model, nn.CrossEntropyLoss()).describe()
    notes = {row.parameter: row.note for row in table.rows}
    assert list(notes) == [n for n, _ in model.named_parameters()]
    assert notes["norm1.weight"].startswith("fallback from kron_io: ")
    assert notes["q.weight"] == ""


def test_describe_says_what_is_left_and_why() -> None:
    rows = make(overrides={"2": None}).attach(net(), nn.CrossEntropyLoss()).describe().rows
    assert [(r.parameter, r.note) for r in rows if r.block == "-"] == [("2.weight", "left by an override"), ("2.bias", "left by an override")]


def test_what_the_user_left_out_or_what_falls_back_warns_of_nothing() -> None:
    """The only warning is that of `test_identities_derived.py`: a layer that no option asked to leave keeps its plain gradient."""

    def norms() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for matrix, repr, overrides in (
            ("ggn", "kron_io", None),  # the norm falls back
            ("input_second_moment", "kron_io", {"1": None}),  # it has no inputs, and is left out
            ("input_second_moment", "kron_io", {nn.LayerNorm: None}),
            ("input_second_moment", "kron_io", {"1": {"matrix": "ggn", "repr": "unit"}}),
        ):
            model = norms()
            make(matrix, repr, overrides=overrides).attach(model, nn.CrossEntropyLoss(), sgd(model))
        model = norms()
        model[1].requires_grad_(False)
        make("input_second_moment", "kron_io").attach(model, nn.CrossEntropyLoss(), sgd(model))
        model = norms()
        some = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
        table = make("input_second_moment", "kron_io").attach(model, nn.CrossEntropyLoss(), some).describe()
        assert [row.parameter for row in table.rows if row.block == "-"] == ["1.weight", "1.bias"]
    with pytest.warns(UserWarning, match="layer '1' keeps its plain gradient"):
        make("input_second_moment", "kron_io").attach(model := norms(), nn.CrossEntropyLoss(), sgd(model))


def test_the_chain_of_fallbacks_is_kronecker_unit_diagonal() -> None:
    """Norms go by unit, what has neither by element; the solver is the user's where it fits."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GRU(5, 3, batch_first=True)).double()
    criterion, optimizer = nn.MSELoss(), sgd(model)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)[0]
            return out

    rows = make("empirical_fisher", "kron_io", "cholesky").attach(First(), criterion, optimizer).describe().rows
    held = {row.parameter.removeprefix("inner."): row.triple.split(" x ")[1:] for row in rows}
    assert held["0.weight"] == ["kron_io", "cholesky"] and held["1.weight"] == ["unit", "cholesky"]
    assert held["2.weight_hh_l0"] == ["diagonal", "elementwise"]
    assert all("fallback from kron_io" in row.note for row in rows if not row.parameter.startswith("inner.0"))


def test_before_the_start_the_gradient_is_raw_and_statistics_are_gathered() -> None:
    preconditioner = make(history=0.5, start_step=2)
    ours = fit(preconditioner)
    raw = fit(None, steps=2)
    same(fit(make(history=0.5, start_step=2), steps=2), raw)
    trajectory = [fit(None, steps=k) for k in range(3)]
    C = sum(w * of("ggn")(m, *b) for w, m, b in zip((0.125, 0.25, 0.5), trajectory, batches(), strict=True)) / 0.875
    g = gradient(raw, *batches()[2])
    move(raw, -LR * solve(C, 0.1, g))
    same(ours, raw)


def dense_by_interval(observe: Callable[[int], bool], refresh: Callable[[int], bool], steps: int = 7) -> nn.Module:
    model, C, weight, inverse = net(), torch.zeros(43, 43, dtype=torch.float64), 0.0, None
    for t, (x, y) in enumerate(batches(steps)):
        g = gradient(model, x, y)
        if observe(t):
            C, weight = 0.5 * C + 0.5 * of("ggn")(model, x, y), 0.5 * weight + 0.5
            if refresh(t) or inverse is None:
                inverse = torch.linalg.inv(C / weight + 0.1 * torch.eye(43, dtype=C.dtype))
        move(model, -LR * (g if inverse is None else inverse @ g))
    return model


INTERVALS: dict[str, tuple[Any, Any, Callable[[int], bool], Callable[[int], bool]]] = {
    "each": (1, None, lambda t: True, lambda t: True),
    "both_2": (2, None, lambda t: t % 2 == 0, lambda t: t % 2 == 0),
    "solver_3": (1, 3, lambda t: True, lambda t: t % 3 == 0),
    "observe_2_solve_4": (2, 4, lambda t: t % 2 == 0, lambda t: t % 4 == 0),
    "functions": (lambda t: t in (1, 2, 5), lambda t: t == 5, lambda t: t in (1, 2, 5), lambda t: t == 5),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_say_when_to_observe_and_refresh(name: str) -> None:
    curvature, solver, observe, refresh = INTERVALS[name]
    preconditioner = make(history=0.5, curvature_interval=curvature, solver_interval=solver)
    same(fit(preconditioner, steps=7), dense_by_interval(observe, refresh))
    assert preconditioner.diagnostics["observations"] == sum(map(observe, range(7)))


def test_a_stale_inverse_would_be_seen() -> None:
    differ(fit(make(history=0.5), steps=7), fit(make(history=0.5, solver_interval=3), steps=7))


def test_on_steps_with_nothing_due_there_is_no_layer_hook() -> None:
    seen: list[int] = []

    class Looking(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(model[0]._forward_hooks) + len(model[2]._forward_hooks))
            return super().forward(x)

    model, criterion = net(), nn.CrossEntropyLoss()
    model[1] = Looking()
    optimizer = sgd(model)
    make(repr="kron_io", history=0.5, curvature_interval=3).attach(model, criterion, optimizer)
    for x, y in batches(5):
        plain(model, criterion, optimizer, x, y)
    assert [count > 0 for count in seen] == [True, False, False, True, False]


def test_a_loss_of_another_kind_is_fine_on_steps_with_nothing_due() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    make(history=0.5, curvature_interval=2).attach(model, criterion, optimizer)
    (x, y), (z, _) = batches(2)
    plain(model, criterion, optimizer, x, y)
    before = theta(model)
    optimizer.zero_grad()
    model(z).square().mean().backward()
    optimizer.step()
    C, start = of("ggn")(net(), x, y), model_like(before)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(start(z).square().mean(), list(start.parameters()))])
    assert_close(theta(model), before - LR * solve(C, 0.1, slope), **EXACT)


def model_like(values: Tensor) -> nn.Module:
    model = net()
    torch.nn.utils.vector_to_parameters(values, model.parameters())
    return model
