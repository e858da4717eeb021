"""Claims about Levenberg-Marquardt damping:

- rho and the new value are the published rules: Martens (2/3, 1/4, 3/4), K-FAC (omega^T1 at every T1 steps, the damping in q), the loss rising
  is minus infinity; bounds hold; a step that moved nothing, or a loss that was not finite before it, changes nothing;
- on an exact quadratic rho is 1 without the damping in q (so the value shrinks by 2/3 each step), and is not with it;
- in training the values are those of a dense loop, for a dense block, blocks by layer, K-FAC's own factors, Hessian-free by replay, the
  named exact matrix, momentum and weight decay in the displacement, through dropout and accumulation;
- the state is saved and resumed to the last bit; ranks agree; overrides have their own;
- what cannot be heard is refused: no optimizer, no criterion, a matrix without products, an auxiliary loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import precond
from nets import seeded
from precond import InvalidCombination, ObservationError, Preconditioner, UnknownName, UsageError
from precond.damping import LevenbergMarquardt, Move, Tikhonov
from training import EXACT, accumulate, batches, differ, fit, gradient, make, move, net, of, plain, same, sgd, solve, theta

CE = nn.CrossEntropyLoss


def level(preconditioner: Preconditioner, block: int = 0) -> float:
    return float(preconditioner._session.blocks[block].level["value"])


def heard(before: float, after: float, slope: float, curvature: float, square: float = 1.0) -> Move:
    return Move(*(torch.tensor(v, dtype=torch.float64) for v in (before, after, slope, curvature, square)))


@pytest.mark.parametrize(
    ("move_", "factor"),
    [
        (heard(3.0, 2.0, -1.5, 1.0), 2 / 3), (heard(3.0, 2.5, -1.5, 1.0), 1.0), (heard(3.0, 2.9, -1.5, 1.0), 1.5), (heard(3.0, 3.1, -1.5, 1.0), 1.5),
        (heard(3.0, 3.1, 1.5, 1.0), 1.5), (heard(3.0, 2.9, 1.0, 1.0), 1.5), (heard(3.0, float("nan"), -1.5, 1.0), 1.5),
        (heard(3.0, float("inf"), -1.5, 1.0), 1.5), (heard(float("nan"), 1.0, -1.5, 1.0), 1.0), (heard(3.0, 3.0, 0.0, 0.0, 0.0), 1.0),
    ],
)  # fmt: skip
def test_the_rule_of_martens(move_: Move, factor: float) -> None:
    state = LevenbergMarquardt(0.3).after_step({}, move_)
    assert float(state["value"]) == pytest.approx(0.3 * factor, rel=1e-14) and state["steps"] == 1


def test_the_rule_of_kfac() -> None:
    rule, good = LevenbergMarquardt.kfac(150.0), heard(3.0, 2.0, -1.5, 1.0, 1e-6)
    assert (rule.model, rule.include_damping) == ("fisher", True)
    state: dict[str, Any] = {}
    asked = []
    for _ in range(10):
        asked.append(rule.asks(state) is not None)
        state = rule.after_step(state, good if asked[-1] else None)
    assert asked == [False] * 4 + [True] + [False] * 4 + [True]
    assert float(state["value"]) == pytest.approx(150 * 0.95**10)
    with_damping = LevenbergMarquardt(0.4, include_damping=True)
    assert float(with_damping.ratio(heard(3.0, 2.0, -1.5, 1.0, 2.0), torch.tensor(0.4))) == pytest.approx(1 / 0.6)


def test_bounds() -> None:
    up, down = heard(3.0, 4.0, -1.5, 1.0), heard(3.0, 2.0, -1.5, 1.0)
    rule = LevenbergMarquardt(1.0, smallest=0.8, largest=1.2)
    assert float(rule.after_step({}, up)["value"]) == 1.2 and float(rule.after_step({}, down)["value"]) == 0.8


def linear() -> nn.Module:
    return seeded(lambda: nn.Linear(4, 3))


def regression() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.randn(6, 3, dtype=x.dtype, generator=torch.Generator().manual_seed(9 + i))) for i, (x, _) in enumerate(batches(4))]


@pytest.mark.parametrize("repr", ["full", "matrix_free"])
def test_on_an_exact_quadratic_rho_is_one(repr: str) -> None:
    """Linear model and squared loss; the update is damped and scaled by the learning rate, and the model knows it."""
    solver = "cholesky" if repr == "full" else precond.solvers.CG(tolerance=1e-13)
    for include, rho_is_one in ((False, True), (True, False)):
        preconditioner = make("ggn", repr, solver, LevenbergMarquardt(0.3, include_damping=include))
        fit(preconditioner, build=linear, criterion=nn.MSELoss(), data=regression())
        rho = float(preconditioner._session.blocks[0].level["rho"])
        assert (abs(rho - 1) < 1e-9) is rho_is_one
        if rho_is_one:
            assert level(preconditioner) == pytest.approx(0.3 * (2 / 3) ** 4, rel=1e-12)


Matrix = Callable[[nn.Module, Tensor, Tensor], Tensor]


def dense_run(
    matrix: Matrix,
    model_of_loss: Matrix,
    start: float,
    *,
    steps: int = 6,
    lr: float = 3.0,
    include: bool = False,
    outer: Any = None,
    **rule: Any,
) -> tuple[nn.Module, list[float]]:
    """theta <- outer(theta, (C + l I)^-1 g), l by Martens' rule from losses and a quadratic form, all dense."""
    model, criterion, value, values = net(), CE(), start, []
    optimizer = outer(model) if outer else sgd(model, lr)
    for x, y in batches(steps):
        C, M, g = matrix(model, x, y), model_of_loss(model, x, y), gradient(model, x, y)
        before, old = criterion(model(x), y).item(), theta(model)
        direction = solve(C, value, g)
        for p, d in zip(model.parameters(), direction.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = d.view_as(p).clone()
        optimizer.step()
        d = theta(model) - old
        q = float(g @ d + 0.5 * d @ M @ d + (0.5 * value * d @ d if include else 0.0))
        change = criterion(model(x), y).item() - before
        rho = -float("inf") if change > 0 else change / q
        value = value * rule.get("factor", 2 / 3) if rho > 0.75 else value / rule.get("factor", 2 / 3) if not rho >= 0.25 else value
        values.append(value)
    return model, values


def blocks_of(C: Tensor) -> Tensor:
    out = torch.zeros_like(C)
    out[:25, :25], out[25:, 25:] = C[:25, :25], C[25:, 25:]
    return out


def trace(
    preconditioner: Preconditioner, loop: Any = plain, *, steps: int = 6, lr: float = 3.0, outer: Any = None
) -> tuple[nn.Module, list[float]]:
    model, criterion, values = net(), CE(), []
    optimizer = outer(model) if outer else sgd(model, lr)
    preconditioner.attach(model, criterion, optimizer)
    for x, y in batches(steps):
        loop(model, criterion, optimizer, x, y)
        values.append(level(preconditioner))
    return model, values


GGN, HESSIAN = of("ggn"), of("hessian")
CASES: dict[str, tuple[Callable[..., Preconditioner], Matrix, Matrix]] = {
    "full": (lambda lm: make("ggn", "full", "cholesky", lm), GGN, GGN),
    "layer": (lambda lm: make("ggn", "layer", "eigen", lm), lambda *a: blocks_of(GGN(*a)), lambda *a: blocks_of(GGN(*a))),
    "products": (lambda lm: make("ggn", "matrix_free", precond.solvers.CG(tolerance=1e-14), lm), GGN, GGN),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("include", [False, True])
def test_training_follows_the_dense_loop(case: str, include: bool) -> None:
    build, matrix, model_of_loss = CASES[case]
    ours, values = trace(build(LevenbergMarquardt(0.05, include_damping=include)))
    expected, wanted = dense_run(matrix, model_of_loss, 0.05, include=include)
    assert_close(values, wanted, **EXACT)
    same(ours, expected)
    assert len(set(values)) > 2 and max(values) > 0.05  # it went up somewhere: the rule was at work


def test_the_model_of_the_loss_may_be_an_exact_matrix() -> None:
    """Blocks by layer for the step, the whole GGN, or the Hessian, at theta, for the prediction."""
    for name, oracle in (("ggn", GGN), ("fisher", GGN), ("hessian", HESSIAN)):
        ours, values = trace(make("ggn", "layer", "eigen", LevenbergMarquardt(0.05, curvature=name, lower=0.25)))
        expected, wanted = dense_run(lambda *a: blocks_of(GGN(*a)), oracle, 0.05)
        assert_close(values, wanted, **EXACT)
        same(ours, expected)


def test_the_displacement_is_the_actual_one() -> None:
    """Momentum and weight decay of the optimizer are in d."""

    def outer(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=1.5, momentum=0.9, weight_decay=0.01)

    ours, values = trace(make("ggn", "full", "cholesky", LevenbergMarquardt(0.05)), outer=outer)
    expected, wanted = dense_run(GGN, GGN, 0.05, outer=outer)
    assert_close(values, wanted, **EXACT)
    same(ours, expected)


def test_accumulation_and_frozen_loss_scale() -> None:
    ours, values = trace(make("ggn", "full", "cholesky", LevenbergMarquardt(0.05)), accumulate(2, 4))
    expected, wanted = trace(make("ggn", "full", "cholesky", LevenbergMarquardt(0.05)))
    assert_close(values, wanted, **EXACT)
    same(ours, expected)


def test_dropout_is_the_same_before_and_after() -> None:
    """With a learning rate of almost 0 the loss changes by g^T d alone, so that rho is 1: with other masks it would be anything."""
    model, criterion = seeded(lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))), CE()
    preconditioner = make("ggn", "layer", "eigen", LevenbergMarquardt(0.05))
    preconditioner.attach(model, criterion, optimizer := sgd(model, 1e-7))
    for x, y in batches(3):
        plain(model, criterion, optimizer, x, y)
        assert float(preconditioner._session.blocks[0].level["rho"]) == pytest.approx(1.0, abs=1e-4)


def test_kfac_with_its_own_factors() -> None:
    rule = LevenbergMarquardt(0.05)
    preconditioner = make("ggn", "kron_io", "cholesky", rule)
    model, criterion = net(), CE()
    preconditioner.attach(model, criterion, optimizer := sgd(model, 3.0))
    value = 0.05
    for x, y in batches(4):
        before, old, g = criterion(model(x), y).item(), theta(model), gradient(model, x, y)
        plain(model, criterion, optimizer, x, y)
        d = theta(model) - old
        q = float(g @ d)
        for name, (start, rows) in {"0": (0, 5), "2": (25, 3)}.items():  # row-major vec of [W, b]
            width = 4 if name == "0" else 5
            piece = d[start : start + rows * (width + 1)]
            v = torch.cat([piece[: rows * width].view(rows, width), piece[rows * width :].view(rows, 1)], 1).flatten()
            C = preconditioner.operators[name].to_dense()
            q += float(0.5 * v @ C @ v)
        rho = (criterion(model(x), y).item() - before) / q
        rho = -1.0 if rho * q > 0 else rho
        value = value * 2 / 3 if rho > 0.75 else value * 1.5 if rho < 0.25 else value
        assert level(preconditioner) == level(preconditioner, 1) == pytest.approx(value, rel=1e-10)
    assert f"Factored(value={float(preconditioner._session.blocks[0].damping.amount)}, pi=True)" in str(preconditioner.describe())


def test_a_constant_damping_is_another_run() -> None:
    """Negative control."""
    ours, _ = trace(make("ggn", "full", "cholesky", LevenbergMarquardt(0.05)))
    fixed = net()
    for x, y in batches(6):
        move(fixed, -3.0 * solve(GGN(fixed, x, y), 0.05, gradient(fixed, x, y)))
    differ(ours, fixed)


def test_it_rests_before_the_start_and_counts_observed_steps() -> None:
    preconditioner = make("ggn", "full", "cholesky", LevenbergMarquardt(0.05, every=2), start_step=2)
    model, criterion = net(), CE()
    preconditioner.attach(model, criterion, optimizer := sgd(model))
    seen = []
    for x, y in batches(6):
        plain(model, criterion, optimizer, x, y)
        seen.append(dict(preconditioner._session.blocks[0].level).get("steps", 0))
    assert seen == [0, 0, 1, 2, 3, 4]
    assert "value" in preconditioner._session.blocks[0].level


@pytest.mark.parametrize("case", ["full", "products"])
def test_a_resumed_run_is_the_same_to_the_last_bit(case: str) -> None:
    def run(model: nn.Module, preconditioner: Preconditioner, data: Any) -> None:
        criterion, optimizer = CE(), sgd(model, 3.0)
        preconditioner.attach(model, criterion, optimizer)
        for x, y in data:
            plain(model, criterion, optimizer, x, y)

    first = CASES[case][0](LevenbergMarquardt(0.05, every=2))
    model = net()
    run(model, first, batches(3))
    saved, other = copy.deepcopy(first.state_dict()), copy.deepcopy(model)
    rest = batches(7)[3:]
    first.remove()
    run(model, first, rest)
    second = CASES[case][0](LevenbergMarquardt(0.05, every=2))
    second.load_state_dict(saved)
    run(other, second, rest)
    assert torch.equal(theta(model), theta(other))
    assert level(first) == level(second) != 0.05


def test_overrides_have_their_own() -> None:
    preconditioner = make(
        "ggn", "layer", "eigen", LevenbergMarquardt(0.05), overrides={"2": {"damping": LevenbergMarquardt(0.5, factor=0.5)}}
    )
    fit(preconditioner, steps=1)
    assert level(preconditioner, 0) in (0.05 * 2 / 3, 0.05, 0.05 * 1.5) and level(preconditioner, 1) in (0.25, 0.5, 1.0)
    mixed = make("ggn", "layer", "eigen", 0.1, overrides={"2": {"damping": LevenbergMarquardt(0.5)}})
    fit(mixed, steps=1)
    assert mixed._session.blocks[0].level == {} and "value" in mixed._session.blocks[1].level


def test_a_bad_batch_changes_nothing() -> None:
    preconditioner = make("ggn", "full", "cholesky", LevenbergMarquardt(0.05))
    model, criterion = net(), CE()
    preconditioner.attach(model, criterion, optimizer := sgd(model))
    (x, y), (z, w) = batches(2)
    plain(model, criterion, optimizer, x, y)
    old = level(preconditioner)
    plain(model, criterion, optimizer, z * torch.nan, w)
    assert level(preconditioner) == old


def test_what_cannot_be_heard_is_refused() -> None:
    rule = LevenbergMarquardt(0.1)
    with pytest.raises(UsageError, match=r"attach\(model, criterion, optimizer\)"):
        make(damping=rule).attach(net(), CE())
    with pytest.raises(UsageError, match="pass it, attach"):
        make("batched_empirical_fisher", "layer", "cholesky", rule).attach(model := net(), None, sgd(model))
    with pytest.raises(InvalidCombination, match="that matrix gives no products"):
        make(damping=LevenbergMarquardt(0.1, curvature="input_second_moment")).attach(model := net(), CE(), sgd(model))
    with pytest.raises(UnknownName, match="ggn"):
        make(damping=LevenbergMarquardt(0.1, curvature="gnn")).attach(model := net(), CE(), sgd(model))


def test_an_auxiliary_loss_is_seen() -> None:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        (criterion(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
        optimizer.step()

    with pytest.raises(ObservationError, match="is not that of the criterion calls alone"):
        fit(make("hessian", "full", "lu", LevenbergMarquardt(2.0)), loop, steps=1)


def test_a_criterion_given_by_name_has_no_loss_to_evaluate() -> None:
    model = net()
    preconditioner = make(damping=LevenbergMarquardt(0.1)).attach(model, "categorical", optimizer := sgd(model))
    (x, y), criterion = batches(1)[0], CE()
    output = model(x)
    preconditioner.observe(criterion(output, y), output, y).backward()
    with pytest.raises(ObservationError, match="attach a criterion module"):
        optimizer.step()


def test_it_works_where_the_matrix_needs_no_criterion_of_its_own() -> None:
    """The batched empirical Fisher is made of p.grad alone; the losses are heard all the same."""
    preconditioner = make("batched_empirical_fisher", "layer", "cholesky", LevenbergMarquardt(0.1))
    fit(preconditioner, steps=3)
    assert level(preconditioner) != 0.1


def test_it_is_the_damping_of_the_refresh() -> None:
    preconditioner = make(damping=LevenbergMarquardt(0.05))
    fit(preconditioner, steps=2)
    block = preconditioner._session.blocks[0]
    assert isinstance(block.damping, Tikhonov) and float(block.damping.amount) in (0.05 * 2 / 3, 0.05, 0.05 * 1.5)
