"""Claims about a refresh that fails, injected through a preconditioner in training:

- a refresh that fails n times climbs: float64, damping x10 three times, then the last good state is kept; each rung is counted, and the
  step is that of the rung: the plain one in float64, the more damped one, the one with the state before;
- a state that is not finite counts as a failure, an error that is no matter of numbers does not and comes out as it is;
- the fourth refresh in a row that fails raises `RefreshFailure` with the block, its triple, its shapes and what to try; one that holds in
  between starts the count again; failures of one block do not stop the others;
- a matrix that a solver rejects (singular, indefinite) climbs by itself; a solve that breaks down stops its block for that step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from precond import Preconditioner, RefreshFailure, SolverFailure, numerics, solvers
from training import EXACT, LR, batches, differ, fit, fit_dense, gradient, make, move, net, of, plain, same, sgd, solve, theta

RUNGS = ("retries_float64", "retries_damping", "retries_cpu", "blocks_kept")


class Failing(solvers.Cholesky):
    """Its refresh fails as often as a script says: one entry a step, the number of failures in that step."""

    name = "cholesky"

    def script(self, *failures: int, how: Callable[[], Any] | None = None, n: int | None = None) -> Failing:
        object.__setattr__(self, "failures", list(failures))
        object.__setattr__(self, "how", how or _fail)
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "left", -1)
        return self

    def begin(self) -> None:
        object.__setattr__(self, "left", self.failures.pop(0) if self.failures else 0)

    def refresh(self, state: Any, operator: Any, damping: Any) -> Any:
        if self.left > 0 and self.n in (None, operator.n):
            object.__setattr__(self, "left", self.left - 1)
            return self.how()
        return super().refresh(state, operator, damping)


def _fail() -> Any:
    raise SolverFailure("injected")


def _not_finite() -> Any:
    return {"factor": torch.full((2, 2), float("nan"))}


def train(solver: Failing, steps: int = 1, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Preconditioner, nn.Module]:
    preconditioner = make(solver=solver, **options)  # the cell is checked here, with a refresh of its own
    model, criterion = net().to(dtype), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    for x, y in batches(steps):
        solver.begin()
        plain(model, criterion, optimizer, x.to(dtype), y)
    return preconditioner, model


def counted(preconditioner: Preconditioner) -> dict[str, int]:
    return {name: n for name in RUNGS if (n := preconditioner.diagnostics[name])}


HOW = pytest.mark.parametrize("how", [_fail, _not_finite], ids=["raises", "not_finite"])


@HOW
def test_one_failure_in_float32_is_solved_in_float64(how: Any) -> None:
    preconditioner, model = train(Failing().script(1, how=how), dtype=torch.float32)
    assert counted(preconditioner) == {"retries_float64": 1}
    assert_close(theta(model).double(), theta(fit_dense(of("ggn"), steps=1)), rtol=1e-5, atol=1e-6)
    assert all(t.dtype == torch.float32 for t in preconditioner._session.blocks[0].state.values() if isinstance(t, torch.Tensor))


@HOW
@pytest.mark.parametrize("failures", [1, 2, 3])
def test_more_failures_raise_the_damping_tenfold_each(how: Any, failures: int) -> None:
    preconditioner, model = train(Failing().script(failures, how=how), damping=1e-3)
    assert counted(preconditioner) == {"retries_damping": 1}
    same(model, fit_dense(of("ggn"), 1e-3 * 10.0**failures, steps=1))
    differ(model, fit_dense(of("ggn"), 1e-3, steps=1))


def test_the_raised_damping_is_of_that_refresh_only() -> None:
    preconditioner, model = train(Failing().script(1, 0, 0), steps=3)
    expected = fit_dense(of("ggn"), 1.0, steps=1)
    for x, y in batches(3)[1:]:
        move(expected, -LR * solve(of("ggn")(expected, x, y), 0.1, gradient(expected, x, y)))
    same(model, expected)
    assert counted(preconditioner) == {"retries_damping": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_when_every_rung_fails_the_last_good_state_is_kept(dtype: torch.dtype) -> None:
    preconditioner, model = train(Failing().script(0, 99, 0), steps=3, dtype=dtype, history=0.5)
    assert counted(preconditioner) == {"blocks_kept": 1}
    assert preconditioner.diagnostics["refreshes"] == 2
    late = fit(make(history=0.5, solver_interval=lambda step: step != 1))  # the same steps with no refresh in step 1
    assert_close(theta(model).double(), theta(late), **(EXACT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}))


def test_without_a_good_state_yet_the_gradient_is_raw() -> None:
    preconditioner, model = train(Failing().script(99))
    same(model, fit(None, steps=1))
    assert counted(preconditioner) == {"blocks_kept": 1}


def test_the_rung_on_the_cpu_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no other device here: the ladder's own test injects the rung, this one that its name arrives."""
    climb = numerics.climb
    monkeypatch.setattr(numerics, "climb", lambda *args, **options: (climb(*args, **options)[0], "cpu"))
    preconditioner, model = train(Failing().script(0))
    assert counted(preconditioner) == {"retries_cpu": 1}
    same(model, fit_dense(of("ggn"), steps=1))


def test_the_fourth_failure_in_a_row_raises_with_all_there_is_to_know() -> None:
    solver = Failing().script(0, 99, 99, 99, 99)
    with pytest.raises(RefreshFailure) as caught:
        train(solver, steps=5, repr="kron_io", history=0.5)
    message = str(caught.value)
    for part in (
        "block '0' (ggn x kron_io x cholesky, Kronecker of 25;", "A (5, 5)", "B (5, 5)", "could not be refreshed 4 times in a row",
        "Raise damping (now Factored(value=0.1, pi=True))", "overrides={'0': None}", "injected",
    ):  # fmt: skip
        assert part in message, message
    assert solver.failures == []  # steps 1, 2 and 3 went by


def test_three_failures_in_a_row_do_not_raise_and_a_good_refresh_starts_again() -> None:
    preconditioner, model = train(Failing().script(0, 99, 99, 99, 0, 99, 99, 99, 0), steps=9)
    assert counted(preconditioner) == {"blocks_kept": 6}
    assert bool(theta(model).isfinite().all())


def test_the_failures_of_one_block_do_not_stop_the_others() -> None:
    preconditioner, model = train(Failing().script(99, n=25), repr="layer")
    expected, (x, y) = net(), batches(1)[0]
    step, C = gradient(expected, x, y), of("ggn")(expected, x, y)
    step[25:] = solve(C[25:, 25:], 0.1, step[25:])
    move(expected, -LR * step)
    same(model, expected)
    assert counted(preconditioner) == {"blocks_kept": 1}
    assert preconditioner.diagnostics["refreshes"] == 1


def test_failures_in_a_row_survive_a_checkpoint() -> None:
    preconditioner, model = train(Failing().script(0, 99, 99, 99), steps=4)
    again = make(solver=Failing().script(99))
    criterion = nn.CrossEntropyLoss()
    again.attach(model, criterion, optimizer := sgd(model)).load_state_dict(preconditioner.state_dict())
    again.triple.solver.begin()
    with pytest.raises(RefreshFailure, match="4 times in a row"):
        plain(model, criterion, optimizer, *batches(1)[0])


def test_an_error_that_is_no_matter_of_numbers_comes_out() -> None:
    def bug() -> Any:
        raise RuntimeError("a bug of the solver")

    with pytest.raises(RuntimeError, match="a bug of the solver"):
        train(Failing().script(1, how=bug))


def test_a_singular_matrix_climbs_by_itself() -> None:
    """Without damping the GGN of 6 examples in 43 parameters has no inverse: 1e-8 of its mean diagonal, and ten times more, is added."""
    preconditioner = make(damping=0.0)
    model = fit(preconditioner, steps=1)
    assert counted(preconditioner) == {"retries_damping": 1}
    assert bool(theta(model).isfinite().all())


def test_an_indefinite_matrix_climbs_until_the_damping_is_enough() -> None:
    H = of("hessian")(net(), *batches(1)[0])
    least = float(torch.linalg.eigvalsh(H)[0])
    assert least < -1e-3
    preconditioner = make("hessian", damping=-least / 5)  # ten times that is enough
    same(fit(preconditioner, steps=1), fit_dense(of("hessian"), -least * 2, steps=1))
    assert counted(preconditioner) == {"retries_damping": 1}


def test_a_solve_that_breaks_down_stops_its_block_for_the_step() -> None:
    preconditioner = make("hessian", "matrix_free", solvers.CG(negative_curvature="raise"), 1e-6)
    model = fit(preconditioner, steps=2)
    same(model, net())
    assert preconditioner.diagnostics["solves_failed"] == 2
    assert preconditioner.diagnostics["steps"] == 2
