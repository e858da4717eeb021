"""What `precond compare` claims.

- a level counts as reached at the first step whose trailing mean is there, and not before the window is full;
- contenders start from the same parameters and see the same batches;
- the best rate of a grid is taken, and one at the edge is said to be;
- the figures of a table are those of hand-made runs;
- a failure or a Ctrl-C costs the run it hits and no other;
- the report, the pictures and the JSON are written and agree.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from precond.cli import main
from precond.compare import curves, report, run, session, tasks
from precond.compare.contenders import Built, Contender, TorchOptimizer, parse, parse_all
from precond.compare.memory import peak_bytes
from precond.compare.run import Budget, Run, train
from precond.compare.session import Plan, Results, compare
from precond.compare.table import Target, baseline_target, rows
from precond.compare.tasks import Task
from precond.compare.tune import Tuning, tune
from precond.errors import SolverFailure, UnknownName, UsageError

CPU = torch.device("cpu")
NO_TUNING = Tuning(points=1)


def toy_task(name: str = "toy") -> Task:
    """Two separable clouds in the plane: 64 points to train on, 16 to test."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(80) % 2
    inputs = torch.randn(80, 2, generator=generator) + 4.0 * targets[:, None]

    def make_model(seed: int) -> nn.Module:
        model = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        return model

    return Task(
        name=name,
        summary="two clouds",
        make_model=make_model,
        make_criterion=nn.CrossEntropyLoss,
        train_inputs=inputs[:64],
        train_targets=targets[:64],
        test_inputs=inputs[64:],
        test_targets=targets[64:],
    )


def toy_plan(contenders: str = "sgd,adamw", seeds: int = 2) -> Plan:
    task = toy_task()
    return Plan(
        tasks=[task],
        contenders=parse_all([contenders]),
        seeds=seeds,
        budgets={task.name: Budget.of_epochs(3, 16, task)},
        tuning=NO_TUNING,
    )


def fixed(lr: float) -> Contender:
    return parse(f"sgd:lr={lr}")


# curves


def test_a_loss_level_is_reached_when_the_full_window_is_below_it() -> None:
    losses = [0.0, 4.0, 4.0, 1.0, 1.0, 0.5]
    assert curves.steps_to_loss(losses, level=1.0, window=1) == 1
    assert curves.steps_to_loss(losses, level=1.0, window=2) == 5  # the lucky first batch does not count
    assert curves.steps_to_loss(losses, level=1.0, window=3) == 6
    assert curves.steps_to_loss(losses, level=0.1, window=2) is None
    assert curves.steps_to_loss([1.0], level=2.0, window=2) is None


def test_an_accuracy_level_is_reached_at_the_step_it_was_measured() -> None:
    assert curves.steps_to_accuracy([0.2, 0.7, 0.9], [4, 8, 12], level=0.7) == 8
    assert curves.steps_to_accuracy([0.2], [4], level=0.7) is None


def test_curves_are_resampled_over_the_span_that_all_runs_cover() -> None:
    times = [np.array([1.0, 2.0, 4.0]), np.array([2.0, 8.0])]
    grid, values = curves.resample([np.array([1.0, 1.0, 1.0]), np.array([1.0, 4.0])], times, points=5)
    assert (grid[0], grid[-1]) == pytest.approx((2.0, 4.0))
    assert values[0] == pytest.approx(1.0)
    assert values[1, -1] == pytest.approx(4.0 ** (1 / 3))


# contenders


def test_a_comma_separates_contenders_and_options_alike() -> None:
    labels = [contender.label for contender in parse_all(["adamw:lr=0.1,weight_decay=0.0,sgd:momentum=0.5"])]
    assert labels == ["sgd:momentum=0.5", "adamw:lr=0.1,weight_decay=0.0"]


def test_the_baseline_always_runs() -> None:
    assert [contender.label for contender in parse_all(["adamw"])] == ["sgd", "adamw"]


def test_options_reach_the_optimizer() -> None:
    contender = parse("sgd:momentum=0.5,nesterov=True")
    group = contender.build(nn.Linear(1, 1), nn.MSELoss(), lr=0.25).optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["lr"], contender.fixed) == (0.5, True, 0.25, False)


@pytest.mark.parametrize("text", ["sgd:lrr=0.1", "sgd:lr=-1", "sgd:momentum", "lr=0.1"])
def test_a_wrong_option_is_refused_before_training(text: str) -> None:
    with pytest.raises(UsageError):
        parse_all([text])


def test_an_unknown_contender_is_refused_with_the_closest_name() -> None:
    with pytest.raises(UnknownName, match="did you mean 'adamw'"):
        parse("adanw")


# training


def test_contenders_start_alike_and_see_the_same_batches() -> None:
    budget = Budget(steps=6, batch_size=16)
    first = train(toy_task(), fixed(0.1), lr=1e-12, seed=3, budget=budget, device=CPU)
    second = train(toy_task(), parse("adamw:weight_decay=0.0"), lr=1e-12, seed=3, budget=budget, device=CPU)
    assert first.losses == pytest.approx(second.losses, rel=1e-6)
    other = train(toy_task(), fixed(0.1), lr=1e-12, seed=4, budget=budget, device=CPU)
    assert first.losses != pytest.approx(other.losses, rel=1e-2)


def test_every_step_is_recorded_and_accuracy_after_every_epoch() -> None:
    result = train(toy_task(), fixed(0.1), lr=0.1, seed=0, budget=Budget(steps=10, batch_size=16), device=CPU)
    assert len(result.losses) == len(result.seconds) == 10
    assert result.accuracy_steps == [4, 8, 10]
    assert result.accuracies[-1] > 0.8
    assert result.failure is None


def test_training_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    train(toy_task(), fixed(0.1), lr=0.1, seed=0, budget=Budget(steps=2, batch_size=16), device=CPU)
    assert torch.equal(state, torch.get_rng_state())


def test_a_loss_that_is_not_finite_ends_the_run_and_is_told() -> None:
    task = replace(toy_task(), train_inputs=torch.full((64, 2), float("nan")))
    result = train(task, fixed(0.1), lr=0.1, seed=0, budget=Budget(steps=5, batch_size=16), device=CPU)
    assert result.losses == []
    assert result.failure == "the loss was not finite at step 1"


def test_a_budget_in_epochs_leaves_out_the_incomplete_batch() -> None:
    assert Budget.of_epochs(3, 30, toy_task()).steps == 6
    with pytest.raises(UsageError):
        Budget(steps=0, batch_size=1)


def test_peak_memory_is_the_most_that_is_held_at_once() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        del first
        second, third = torch.zeros(2000), torch.zeros(500)
        del second, third

    assert peak_bytes(work, CPU) == pytest.approx(4 * 2500, rel=0.05)  # blocks are rounded up to their alignment


def test_momentum_shows_in_peak_memory() -> None:
    task = replace(toy_task(), make_model=lambda seed: nn.Sequential(nn.Linear(2, 1000), nn.Linear(1000, 2)))
    plain, momentum = (run.peak_memory(task, parse(f"sgd:momentum={m}"), lr=0.1, batch_size=2, device=CPU) for m in (0.0, 0.9))
    assert plain is not None
    assert momentum is not None
    parameters = 4 * (2 * 1000 + 1000 + 1000 * 2 + 2)
    assert momentum - plain == pytest.approx(parameters, rel=0.1)


# tuning


def test_the_rate_with_the_lowest_loss_is_taken() -> None:
    budget = Budget(steps=12, batch_size=16)
    tuned = tune(toy_task(), parse("sgd"), tuning=Tuning(points=3), budget=budget, device=CPU, on_step=lambda loss: None)
    assert tuned.grid == [0.0316, 0.1, 0.316]
    scores = [score for score in tuned.scores if score is not None]
    assert tuned.lr == tuned.grid[tuned.scores.index(min(scores))]
    assert tuned.at_edge == (tuned.lr != 0.1)


def test_a_rate_that_the_user_gave_is_not_tuned() -> None:
    assert Tuning(points=5).grid(fixed(0.7)) == [0.7]


# the table


def hand_made() -> Results:
    """Two contenders, two seeds, four steps in windows of two, with figures that can be checked by eye."""
    settings = {
        "tasks": {"toy": "two clouds"},
        "train_examples": {"toy": 20},
        "contenders": ["sgd", "fast"],
        "seeds": 2,
        "budgets": {"toy": {"steps": 4, "batch_size": 10}},
        "tuning": {"points": 1, "fraction": 0.5},
        "device": "cpu",
        "machine": "test",
        "versions": {"python": "3", "torch": "2"},
    }

    def make(contender: str, seed: int, losses: list[float], second: float, accuracy: float) -> Run:
        return Run(
            task="toy", contender=contender, seed=seed, lr=0.1, losses=losses, seconds=[second] * 4,
            accuracies=[0.5, accuracy], accuracy_steps=[2, 4],
        )  # fmt: skip

    runs = [
        make("sgd", 0, [4.0, 3.0, 2.0, 1.0], 0.1, 0.80),
        make("sgd", 1, [4.0, 3.0, 2.0, 2.0], 0.1, 0.90),
        make("fast", 0, [4.0, 1.0, 1.0, 1.0], 0.3, 0.95),
        make("fast", 1, [4.0, 4.0, 4.0, 4.0], 0.3, 0.95),
    ]
    return Results(settings=settings, runs=runs, memory={"toy": {"sgd": 100, "fast": 250}})


def test_the_target_is_where_the_baseline_ends() -> None:
    assert baseline_target(hand_made(), "toy").loss == pytest.approx((1.5 + 2.0) / 2)


def test_the_table_holds_the_figures_of_the_runs() -> None:
    sgd, fast = rows(hand_made(), "toy", Target(loss=2.0, origin="given"))
    assert (sgd.accuracy, sgd.accuracy_spread) == pytest.approx((0.85, 0.1 / 2**0.5))
    assert (sgd.reached, sgd.steps_to_target, sgd.seconds_to_target) == (2, 4.0, pytest.approx(0.4))
    assert (fast.reached, fast.steps_to_target, fast.seconds_to_target) == (1, 3.0, pytest.approx(0.9))
    assert (fast.median_step_ratio, fast.mean_step_ratio, fast.memory_ratio) == pytest.approx((3.0, 3.0, 2.5))


def test_a_target_accuracy_is_timed_at_evaluations() -> None:
    sgd, fast = rows(hand_made(), "toy", Target(accuracy=0.9, origin="given"))
    assert (sgd.reached, fast.reached, fast.steps_to_target) == (1, 2, 4.0)


def test_a_failed_run_is_a_remark_and_not_a_figure() -> None:
    results = hand_made()
    results.runs[3].failure = "SolverFailure: no convergence"
    target = baseline_target(results, "toy")
    table = rows(results, "toy", target)
    assert table[1].accuracy_spread is None
    assert table[1].remarks == ["seed 1: SolverFailure: no convergence"]
    assert "fast: seed 1: SolverFailure" in report.markdown(results, {"toy": (target, table)})


def test_what_the_preconditioner_had_to_repair_is_a_remark() -> None:
    results = hand_made()
    results.runs[2].diagnostics = {"steps": 4, "refreshes": 4, "retries_damping": 3}
    table = rows(results, "toy", Target(loss=2.0, origin="given"))
    assert table[1].remarks == ["seed 0: retries_damping 3"]


# the whole comparison


def test_ctrl_c_in_the_second_run_keeps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*args: object, **kwargs: object) -> Run:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "train", interrupted)
    results = compare(toy_plan(), tmp_path)
    assert results.interrupted
    assert [(r.contender, r.seed, len(r.losses)) for r in results.runs] == [("sgd", 0, 12)]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["interrupted"]
    assert len(saved["runs"]) == 1
    table = report.tables(results, lambda task: baseline_target(results, task))
    assert "was interrupted" in report.markdown(results, table)


class Broken(TorchOptimizer):
    """A contender whose solver never converges."""

    def build(self, model: nn.Module, criterion: nn.Module, lr: float) -> Built:
        raise SolverFailure("no convergence")


def test_a_contender_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = Broken(label="broken", lr=0.1, fixed=True, factory=torch.optim.SGD)
    results = compare(replace(toy_plan(), contenders=[fixed(0.1), broken]), tmp_path)
    assert [(r.contender, r.failure) for r in results.runs] == [
        ("sgd:lr=0.1", None),
        ("broken", "SolverFailure: no convergence"),
    ] * 2
    assert results.memory["toy"]["broken"] is None


@pytest.fixture
def toy_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks._TASKS, "toy", toy_task)


@pytest.mark.usefixtures("toy_registered")
def test_the_report_files_exist_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    command = ["compare", "--task", "toy", "--contenders", "adamw", "--seeds", "2", "--epochs", "2", "--batch-size", "16", "--grid", "3"]
    assert main([*command, "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    saved = json.loads((out / "results.json").read_text())
    text = (out / "report.md").read_text()
    assert [row["contender"] for row in answer["tasks"]["toy"]["rows"]] == ["sgd", "adamw"]
    assert len(saved["runs"]) == 4
    assert all(len(one["losses"]) == 8 for one in saved["runs"])
    assert f"| adamw | {answer['tasks']['toy']['rows'][1]['lr']:g} |" in text
    assert "3 rates half a decade apart" in text
    for name in ("loss_by_step.png", "loss_by_second.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


@pytest.mark.usefixtures("toy_registered")
def test_a_recipe_is_trained_like_any_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--task", "toy", "--contenders", "kfac:damping=0.1", "--seeds", "1", "--steps", "4", "--batch-size", "16"]
    assert main([*command, "--grid", "1", "--no-pictures", "--json", "--out", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out)["tasks"]["toy"]["rows"][1]
    assert (row["contender"], row["remarks"]) == ("kfac:damping=0.1", [])
    assert row["accuracy"] is not None
    assert row["memory_ratio"] > 1


@pytest.mark.parametrize("name", ["digits_mlp", "digits_conv"])
def test_the_digits_are_split_once_and_standardised(name: str) -> None:
    task = tasks.get(name)
    assert (len(task.train_inputs), len(task.test_inputs)) == (1438, 359)
    assert float(task.train_inputs.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(task.train_inputs.std()) == pytest.approx(1.0, abs=1e-5)
    model = task.make_model(0)
    assert model(task.test_inputs[:5]).shape == (5, 10)
    assert torch.equal(next(model.parameters()), next(task.make_model(0).parameters()))
    assert not torch.equal(next(model.parameters()), next(task.make_model(1).parameters()))
