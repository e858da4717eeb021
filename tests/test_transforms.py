"""Claims about transforms:

- momentum before and after the preconditioner is torch's (SGD with dampening and Nesterov, Adam's average, NAdam-like averages) step for step,
  and a preconditioner that never starts, grafted onto SGD, Adagrad, RMSprop or Adam, is that optimizer;
- grafting gives the norm of the other method's step, by block or by tile; clips are their formulas, and a block that is not finite counts for
  nothing; numbers that overflow float32 when squared are clipped all the same;
- step rejection and Armijo back-tracking with a closure keep the fraction that the definition says, leave no trace (randomness, buffers, gradients,
  hooks), are counted, and refuse a step without closure or loss; ranks decide alike;
- state is saved and resumed to the last bit; a value that is not finite enters no state; wrong options are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nets import seeded
from precond import Preconditioner, UsageError
from precond.damping import LevenbergMarquardt
from precond.tiling import Tiling
from precond.transforms import Backtrack, ElementClip, Graft, KLClip, Momentum, NormClip, Reject, Rescale, RMSClip, Scene, Transform
from training import EXACT, LR, batches, differ, fit, gradient, make, net, of, plain, same, sgd, solve, theta

SGD, CE = torch.optim.SGD, nn.CrossEntropyLoss
NEVER = 10**9


def never(*transforms: Transform, **options: Any) -> Preconditioner:
    return make(repr="layer", transforms=transforms, start_step=NEVER, **options)


def stock(cls: Any, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: cls(model.parameters(), **{"lr": LR, **options})


OPTIMIZERS: dict[str, tuple[list[Transform], Any]] = {
    "sgd": ([Graft("sgd")], stock(SGD)),
    "adagrad": ([Graft("adagrad", eps=1e-10)], stock(torch.optim.Adagrad)),
    "rmsprop": ([Graft("rmsprop", beta=0.99)], stock(torch.optim.RMSprop)),
    "adam": ([Momentum(0.9), Graft("adam")], stock(torch.optim.Adam)),
    "heavy_ball": ([Momentum(0.9, form="sum", place="after")], stock(SGD, momentum=0.9)),
    "heavy_ball_before": ([Momentum(0.9, form="sum")], stock(SGD, momentum=0.9)),
    "dampened": ([Momentum(0.9, form="sum", dampening=0.3)], stock(SGD, momentum=0.9, dampening=0.3)),
    "nesterov": ([Momentum(0.9, form="sum", nesterov=True, place="after")], stock(SGD, momentum=0.9, nesterov=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_preconditioner_that_never_starts_is_the_stock_optimizer(name: str) -> None:
    transforms, optimizer = OPTIMIZERS[name]
    expected = fit(None, optimizer=optimizer, steps=5)
    same(fit(never(*transforms), steps=5), expected)
    if name != "sgd":
        differ(expected, fit(None, steps=5))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "dampening": 0.2}])
def test_momentum_after_is_that_of_the_optimizer(options: dict[str, Any]) -> None:
    """On preconditioned directions; before the preconditioner it is another method where the matrix changes."""
    own = {
        "beta": options["momentum"],
        "form": "sum",
        "nesterov": options.get("nesterov", False),
        "dampening": options.get("dampening", 0.0),
    }
    expected = fit(make(), optimizer=stock(SGD, **options), steps=4)
    same(fit(make(transforms=[Momentum(place="after", **own)]), steps=4), expected)
    differ(fit(make(transforms=[Momentum(**own)]), steps=4), expected)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_averages(debias: bool, nesterov: bool) -> None:
    rule, state, m, beta = Momentum(0.9, debias=debias, nesterov=nesterov), {}, 0.0, 0.9
    for t in range(1, 5):
        x = torch.full((2,), float(t), dtype=torch.float64)
        m = beta * m + (1 - beta) * t
        expected = (beta * m + (1 - beta) * t if nesterov else m) / ((1 - beta ** (t + nesterov)) if debias else 1)
        assert_close(rule.before({"a": x}, state)["a"], torch.full_like(x, expected), **EXACT)
    constant = {}
    for _ in range(3):
        out = rule.before({"a": torch.ones(1, dtype=torch.float64)}, constant)["a"]
        assert (abs(float(out) - 1) < 1e-12) is debias


def scene(raw: Any = None, started: bool = True, rate: float = 0.5, **options: Any) -> Scene:
    return Scene(raw or {}, {"a": rate, "b": rate}, started, **options)


def vectors(scale: float = 1.0) -> dict[str, Tensor]:
    return {"a": scale * torch.tensor([3.0, -4.0]), "b": scale * torch.tensor([0.0, 12.0, 0.5])}


def test_grafting_has_the_norm_of_the_other_step() -> None:
    g, d, state = vectors(), {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 0.0, 0.0])}, {}
    out = Graft("sgd").after(g, d, state, scene(g))
    assert_close({n: float(v.norm()) for n, v in out.items()}, {n: float(v.norm()) for n, v in g.items()})
    assert_close(out["a"] / out["a"].norm(), d["a"] / d["a"].norm())
    adagrad = Graft("adagrad").after(g, d, state, scene(g))
    assert float(adagrad["a"].norm()) == pytest.approx(2**0.5)  # g / |g| entry by entry


def test_grafting_by_tile() -> None:
    tiling = Tiling((3, 2), ((2, 1), (2,)))
    g, d = torch.arange(1.0, 7.0), torch.tensor([1.0, 0, 0, 0, 0, 2.0])
    out = Graft("sgd").after({"a": g}, {"a": d}, {}, scene({"a": g}, tilings={"a": tiling}))["a"]
    assert_close(out, torch.cat([d[:4] * g[:4].norm(), d[4:] / 2 * g[4:].norm()]))
    whole = Graft("sgd", per="block").after({"a": g}, {"a": d}, {}, scene({"a": g}, tilings={"a": tiling}))["a"]
    assert_close(whole, d * g.norm() / d.norm())
    assert_close(Graft("sgd").after({"a": g}, {"a": d}, {}, scene({"a": g}))["a"], whole)


def test_the_second_moment_is_of_the_raw_gradient() -> None:
    """Negative control: of the momentum it would be another number."""
    raw, average = {"a": torch.tensor([4.0])}, {"a": torch.tensor([1.0])}
    assert float(Graft("adam", eps=0.0).after(average, {"a": torch.ones(1)}, {}, scene(raw))["a"]) == pytest.approx(0.25)


def test_clips_are_their_formulas() -> None:
    g, d = vectors(), vectors(2.0)
    inner, norm = sum(float(d[n] @ g[n]) for n in g), sum(float(v @ v) for v in d.values()) ** 0.5
    assert_close(KLClip(0.1).after(g, d, {}, scene())["b"], d["b"] * (0.1 / (0.25 * inner)) ** 0.5)
    assert_close(KLClip(1e9).after(g, d, {}, scene())["b"], d["b"])
    assert_close(KLClip(0.1).after(g, d, {}, scene(started=False))["b"], d["b"])
    assert_close(NormClip(2.0).after(g, d, {}, scene())["a"], d["a"] * 2 / norm)
    assert_close(RMSClip(1.1).after(g, d, {}, scene())["a"], d["a"] * 1.1 / (d["a"].square().mean().sqrt()))
    assert_close(RMSClip(1e9).after(g, d, {}, scene()), d)
    assert_close(Rescale(0.5).after(g, d, {}, scene())["b"], d["b"] / 2)
    assert Rescale(0.5).after(g, d, {}, scene(started=False)) is d
    with pytest.raises(ValueError, match="positive and finite"):
        Rescale(0.0)
    assert_close(ElementClip(1.0).after(g, d, {}, scene())["b"], torch.tensor([0.0, 1.0, 1.0]))
    for clip in (KLClip(), NormClip(), RMSClip(), ElementClip()):
        assert clip.after({}, {}, {}, scene()) == {}


@pytest.mark.parametrize("clip", [KLClip(1e-3), NormClip(1.0)], ids=["KLClip", "NormClip"])
def test_a_bad_block_counts_for_nothing_and_a_huge_one_is_clipped(clip: Transform) -> None:
    g, d = vectors(), vectors()
    without = clip.after({"a": g["a"]}, {"a": d["a"]}, {}, scene())["a"]
    assert_close(clip.after(g, d | {"b": d["b"] * torch.nan}, {}, scene())["a"], without)
    huge = clip.after(vectors(1e30), vectors(1e30), {}, scene())
    assert sum(float(v.double().square().sum()) for v in huge.values()) < 1.01
    zero = clip.after(vectors(0.0), vectors(0.0), {}, scene())
    assert not any(bool(v.any()) for v in zero.values())


@pytest.mark.parametrize("rule", [Momentum(0.9), Momentum(0.9, form="sum", nesterov=True), Graft("adam"), Graft("adagrad")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_or_overflows_enters_no_state(rule: Any, bad: float) -> None:
    def one(x: Tensor, state: Any) -> Tensor:
        if isinstance(rule, Momentum):
            return rule.before({"a": x}, state)["a"]
        return rule.after({"a": x}, {"a": torch.ones(2)}, state, scene({"a": x}))["a"]

    clean, seen = {}, {}
    for state in (clean, seen):
        one(torch.tensor([1.0, 2.0]), state)
    assert not bool(one(torch.tensor([1.0, bad]), seen).norm().isfinite())  # and such a block does not move
    for state in (clean, seen):
        state["out"] = one(torch.tensor([3.0, 2.0]), state)
    assert torch.equal(clean["out"], seen["out"])


STATES: dict[str, list[Transform]] = {
    "momenta": [Momentum(0.9), Momentum(0.8, form="sum", place="after", dampening=0.1)],
    "graft": [Momentum(0.9, nesterov=True), Graft("adam"), RMSClip(0.5)],
    "adagrad": [Graft("adagrad"), NormClip(0.1)],
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_resumed_run_is_the_same_to_the_last_bit(name: str) -> None:
    first, model = make(repr="layer", transforms=STATES[name]), net()
    data = batches(6)

    def run(preconditioner: Preconditioner, model: nn.Module, part: Any) -> None:
        criterion, optimizer = CE(), sgd(model)
        preconditioner.attach(model, criterion, optimizer)
        for x, y in part:
            plain(model, criterion, optimizer, x, y)
        preconditioner.remove()

    run(first, model, data[:3])
    second, other = make(repr="layer", transforms=STATES[name]), copy.deepcopy(model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, model, data[3:])
    run(second, other, data[3:])
    assert torch.equal(theta(model), theta(other))


# -- searches --------------------------------------------------------------------------------------------------------


def closing(losses: list[float] | None = None, set_to_none: bool = True) -> Any:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = criterion(model(x), y)
            loss.backward()
            if losses is not None:
                losses.append(loss.item())
            return loss

        optimizer.step(closure)

    return loop


def searched(rule: Backtrack | Reject, lr: float, steps: int = 4) -> tuple[nn.Module, list[float]]:
    """By dense algebra."""
    model, criterion, kept = net(), CE(), []
    for x, y in batches(steps):
        loss, g, old = criterion(model(x), y).item(), gradient(model, x, y), theta(model)
        d, t, tries = -lr * solve(of("ggn")(model, x, y), 0.1, g), 1.0, getattr(rule, "reductions", 0) + 1
        while tries:
            _place(model, old + t * d)
            bound = rule.decrease * t * min(float(g @ d), 0.0) if isinstance(rule, Backtrack) else rule.tolerance
            if criterion(model(x), y).item() <= loss + bound:
                break
            t, tries = t * getattr(rule, "shrink", 1.0), tries - 1
        if not tries:
            t = 0.0
            _place(model, old)
        kept.append(t)
    return model, kept


def _place(model: nn.Module, value: Tensor) -> None:
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(value, model.parameters())


@pytest.mark.parametrize(
    ("rule", "lr"),
    [(Backtrack(), 40.0), (Backtrack(1e-2, 0.8, 60), 40.0), (Backtrack(0.9, 0.5, 2), 40.0), (Backtrack(), 0.1),
     (Reject(), 40.0), (Reject(0.5), 20.0), (Reject(), 0.1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_search_keeps_what_its_definition_says(rule: Any, lr: float, set_to_none: bool) -> None:
    preconditioner = make(transforms=[rule])
    ours = fit(preconditioner, closing(set_to_none=set_to_none), steps=4, optimizer=lambda m: sgd(m, lr))
    expected, kept = searched(rule, lr)
    same(ours, expected)
    assert preconditioner.diagnostics["steps_shortened"] == sum(0 < t < 1 for t in kept)
    assert preconditioner.diagnostics["steps_rejected"] == kept.count(0.0)
    if lr > 10:
        assert any(t < 1 for t in kept)
    else:
        same(ours, fit(make(), steps=4))


def test_a_step_that_rises_is_taken_back_to_the_last_bit() -> None:
    preconditioner = make(transforms=[Reject()])
    model = fit(preconditioner, closing(), steps=1, optimizer=stock(SGD, maximize=True))  # uphill
    assert torch.equal(theta(model), theta(net()))
    assert preconditioner.diagnostics["steps_rejected"] == 1 and preconditioner.diagnostics["steps"] == 1


def test_a_bad_batch_is_taken_back() -> None:
    preconditioner = make("ggn", "layer", transforms=[Backtrack(reductions=2)])
    model, criterion = net(), CE()
    preconditioner.attach(model, criterion, optimizer := sgd(model))
    (x, y) = batches(1)[0]
    closing()(model, criterion, optimizer, x * torch.nan, y)
    assert torch.equal(theta(model), theta(net()))


def noisy() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)))


def test_a_search_leaves_no_trace() -> None:
    """An update that is kept whole: randomness, buffers, gradients and hooks are as without a search."""
    after = []
    for transforms in ([], [Backtrack(), Reject(1e9)]):
        torch.manual_seed(3)
        preconditioner = make(repr="layer", transforms=transforms, self_check=False)
        model = fit(preconditioner, closing(), build=noisy, steps=3, optimizer=lambda m: sgd(m, 1e-3))
        after.append([theta(model), *model.buffers(), *(p.grad for p in model.parameters()), torch.get_rng_state()])
        assert preconditioner.diagnostics["steps_shortened"] == preconditioner.diagnostics["steps_rejected"] == 0
        assert preconditioner.diagnostics["observations"] == 3
        preconditioner.remove()
        assert not model._forward_hooks and not model._forward_pre_hooks
    for a, b in zip(*after, strict=True):
        assert torch.equal(a, b)


def test_the_same_masks_are_drawn_for_every_trial() -> None:
    """Of an update of almost nothing the loss is that of before, to rounding: with other masks it would not be."""
    losses: list[float] = []
    preconditioner = make(repr="layer", transforms=[Reject(1e9)], self_check=False)
    torch.manual_seed(3)
    fit(preconditioner, closing(losses), build=noisy, steps=3, optimizer=lambda m: sgd(m, 1e-12))
    assert len(losses) == 6
    assert_close(losses[::2], losses[1::2], rtol=1e-8, atol=0)
    differ(torch.tensor(losses[::2][:-1]), torch.tensor(losses[1::2][1:]), by=1e-4)


def test_damping_hears_of_the_whole_update_before_it_is_taken_back() -> None:
    preconditioner = make(damping=LevenbergMarquardt(0.1), transforms=[Reject()])
    fit(preconditioner, closing(), steps=1, optimizer=lambda m: sgd(m, 1000.0))
    assert preconditioner.diagnostics["steps_rejected"] == 1
    assert float(preconditioner._session.blocks[0].level["value"]) == pytest.approx(0.15)


def test_a_search_needs_a_closure_that_returns_the_loss() -> None:
    with pytest.raises(
        UsageError, match=r"^Backtrack, Reject evaluates the loss again after the update: call optimizer\.step\(closure\)\.$"
    ):
        fit(make(transforms=[Backtrack(), Reject()]), steps=1)
    model, criterion = net(), CE()
    x, y = batches(1)[0]
    make(transforms=[Reject()]).attach(model, criterion, optimizer := sgd(model))
    with pytest.raises(UsageError, match="the closure returned NoneType, not the loss"):
        optimizer.step(lambda: criterion(model(x), y).backward())
    free = make(transforms=[Reject()]).attach(other := net(), criterion)
    criterion(other(x), y).backward()
    with pytest.raises(UsageError, match="attach the optimizer"):
        free.step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Momentum(1.0), "in [0, 1)"), (lambda: Momentum(place="during"), "choose one of 'before', 'after'"),
        (lambda: Momentum(form="ema"), "choose one of 'average', 'sum'"), (lambda: Momentum(dampening=0.1), "belongs to form='sum'"),
        (lambda: Graft(per="row"), "choose one of 'tile', 'block'"), (lambda: Graft(beta=1.0), "in [0, 1)"),
        (lambda: KLClip(0.0), "a bound is positive"), (lambda: Reject(-1.0), "at least 0"), (lambda: Backtrack(shrink=1.0), "shrink in (0, 1)"),
    ],
)  # fmt: skip
def test_options_are_checked_when_made(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        wrong()
    assert message in str(caught.value)
