"""Rule 10 claims, of sampled labels:

- they are the same whether micro-batches are accumulated or their losses summed, whose hooks fire in reverse; a generator shared in hook
  order would draw others;
- the user's own draws in between do not change them, and ours do not change the user's;
- they differ from step to step, from call to call and from seed to seed, and a seed fixes them; `matrix_free` keeps them for a whole solve;
- the Monte-Carlo Fisher is the outer product of the drawn columns, and its mean over many draws the exact Fisher.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import precond
from precond.matrices import FisherMC
from precond.observe import observer
from training import EXACT, Batch, accumulate, batches, differ, fit, make, matrix_of, net, of, plain, same

CELLS = pytest.mark.parametrize("cell", [("full", "cholesky"), ("kron_io", "cholesky"), ("matrix_free", "cg")], ids="-".join)


def mc(cell: tuple[str, str] = ("full", "cholesky"), **options: Any) -> Any:
    return make("fisher_mc", *cell, **options)


def summed(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """The losses of `accumulate(1, 2, 3)` in one backward pass: the hooks fire from the last call to the first."""
    optimizer.zero_grad()
    losses = [criterion(model(xi), yi) * (len(xi) / len(x)) for xi, yi in zip(x.split((1, 2, 3)), y.split((1, 2, 3)), strict=True)]
    sum(losses[1:], losses[0]).backward()
    optimizer.step()


@CELLS
def test_accumulated_and_summed_losses_draw_the_same_labels(cell: tuple[str, str]) -> None:
    same(fit(mc(cell), summed), fit(mc(cell), accumulate(1, 2, 3)))


def test_a_shared_generator_would_draw_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for loop in (summed, accumulate(1, 2, 3)):
        shared = torch.Generator().manual_seed(0)
        monkeypatch.setattr(observer, "keyed_generator", lambda *key, shared=shared: shared)
        runs.append(fit(mc(), loop, steps=1))
    differ(*runs)


runs: list[nn.Module] = []


def drawing(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    torch.rand(3)
    loss = criterion(model(x), y)
    torch.manual_seed(int(1000 * float(loss)))
    loss.backward()
    torch.rand(5)
    optimizer.step()


@CELLS
def test_the_users_draws_do_not_change_the_labels(cell: tuple[str, str]) -> None:
    same(fit(mc(cell), drawing), fit(mc(cell)))


@CELLS
def test_ours_do_not_change_the_users(cell: tuple[str, str]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit(mc(cell))
    assert torch.equal(torch.get_rng_state(), before)


def still(**options: Any) -> Any:
    """Matrices of steps on one batch with a learning rate of zero."""
    seen = []
    preconditioner = mc(**options)

    def loop(*args: Any) -> None:
        plain(*args)
        seen.append(matrix_of(preconditioner))

    fit(preconditioner, loop, data=batches(1) * 3, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    return seen


def test_labels_differ_by_step_call_and_seed_and_are_fixed_by_the_seed() -> None:
    first, second, third = still()
    differ(first, second)
    differ(second, third)
    assert_close(still(), [first, second, third], rtol=0, atol=0)
    differ(still(seed=1)[0], first)


def test_labels_differ_from_call_to_call() -> None:
    def twice(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        for _ in range(2):
            (criterion(model(x), y) / 2).backward()

    two, one = mc(), mc()
    fit(two, twice, steps=1)
    fit(one, lambda m, c, o, x, y: c(m(x), y).backward(), steps=1)
    two.step()
    one.step()
    differ(matrix_of(two), matrix_of(one))


def test_a_seed_is_drawn_from_torch_when_none_is_given() -> None:
    seeds = []
    for start in (0, 0, 1):
        torch.manual_seed(start)
        seeds.append(precond.recipe("kfac").seed)
    assert seeds[0] == seeds[1] != seeds[2]


def expected(batch: Batch, samples: int, seen: list[Tensor]) -> Tensor:
    return dense.fisher_mc(net(), nn.CrossEntropyLoss(), *batch, seen[0])


@pytest.mark.parametrize("samples", [1, 3])
def test_the_matrix_is_that_of_the_drawn_columns(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    cotangents = FisherMC.cotangents
    monkeypatch.setattr(FisherMC, "cotangents", lambda self, context: (seen.append(cotangents(self, context)), seen[-1])[1])
    preconditioner, batch = make(FisherMC(samples=samples)), batches(1)[0]
    fit(preconditioner, data=[batch])
    assert seen[0].shape == (samples, 6, 3)
    assert_close(matrix_of(preconditioner), expected(batch, samples, seen), **EXACT)


def test_the_mean_over_many_draws_is_the_exact_fisher() -> None:
    preconditioner, (x, y) = make(FisherMC(samples=4000)), batches(1)[0]
    fit(preconditioner, steps=1)
    exact = of("fisher")(net(), x, y)
    assert (matrix_of(preconditioner) - exact).norm() < 0.05 * exact.norm()
