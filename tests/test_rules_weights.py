"""Rules 1 and 2 claim, of the loss that was differentiated:

- micro-batches weighted by 1 / k or n_i / N give the matrix and the steps of the whole batch; without the weights they would not;
- a loss scaled by AMP gives the same steps; with "given" weights the scale is divided out by `scaler=`, and only then;
- of c1 + 0.3 c2 "normalised" holds (C1 + 0.3 C2) / 1.3 and "given" C1 + 0.3 C2; the weight goes to B, never to A;
- two criteria on one forward pass form one term gradient for the empirical Fisher, and add for the GGN;
- two backward passes over a retained graph, of two losses or of one loss twice, add.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
from precond.observe import assemble
from training import EXACT, KINDS, accumulate, batches, differ, fit, fit_dense, gradient, make, matrix_of, net, of, same, sgd

CE = nn.CrossEntropyLoss()
DENSE = {"ggn_full": ("ggn", 0.1), "ef_full": ("empirical_fisher", 0.1), "hessian_free": ("ggn", 0.1), "newton": ("hessian", 2.0)}
every = pytest.mark.parametrize("kind", KINDS)


def scaled(scale: float = 1024.0) -> tuple[torch.amp.GradScaler, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(criterion(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()

    return scaler, loop


@pytest.mark.parametrize("kind", DENSE)
def test_a_plain_loop_is_the_dense_one(kind: str) -> None:
    matrix, damping = DENSE[kind]
    same(fit(KINDS[kind]()), fit_dense(of(matrix), damping))


@every
@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (2, 4), (1, 5), (6,)], ids=str)
def test_micro_batches_are_one_batch(kind: str, sizes: tuple[int, ...]) -> None:
    same(fit(KINDS[kind](), accumulate(*sizes)), fit(KINDS[kind]()))


def test_micro_batches_of_unequal_size_need_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(make())
    monkeypatch.setattr(assemble, "_weight", lambda part: torch.ones((), dtype=torch.float64))
    differ(fit(make(), accumulate(1, 5)), whole)


@every
def test_a_loss_scaled_by_amp_takes_the_same_steps(kind: str) -> None:
    _, loop = scaled()
    same(fit(KINDS[kind](), loop), fit(KINDS[kind]()))


def half_and_third(forwards: int) -> Any:
    """c1 + 0.3 c2, on one forward pass (two targets) or on two halves of the batch."""

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        if forwards == 1:
            f = model(x)
            loss = criterion(f, y) + 0.3 * criterion(f, other(y))
        else:
            loss = criterion(model(x[:2]), y[:2]) + 0.3 * criterion(model(x[2:]), y[2:])
        loss.backward()
        optimizer.step()

    return loop


def other(y: Tensor) -> Tensor:
    return (y + 1) % 3


def both(matrix: str, factor: float) -> Any:
    C = of(matrix)
    return lambda model, x, y: factor * (C(model, x[:2], y[:2]) + 0.3 * C(model, x[2:], y[2:]))


def slope_of_both(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return gradient(model, x[:2], y[:2]) + 0.3 * gradient(model, x[2:], y[2:])


def slope_of_one(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return gradient(model, x, y) + 0.3 * gradient(model, x, other(y))


WEIGHTS = pytest.mark.parametrize(("weights", "factor"), [("normalised", 1 / 1.3), ("given", 1.0)])


@WEIGHTS
@pytest.mark.parametrize("matrix", ["ggn", "fisher", "empirical_fisher"])
def test_two_weighted_criteria_on_two_forward_passes_add(weights: str, factor: float, matrix: str) -> None:
    ours = fit(make(matrix, loss_weights=weights), half_and_third(2))
    same(ours, fit_dense(both(matrix, factor), slope=slope_of_both))


@WEIGHTS
@pytest.mark.parametrize("cell", [("ggn", "matrix_free", "cg"), ("hessian", "full", "lu")], ids="-".join)
def test_two_weighted_criteria_add_in_products_too(weights: str, factor: float, cell: tuple[str, str, str]) -> None:
    ours = fit(make(*cell, damping=2.0, loss_weights=weights), half_and_third(2))
    same(ours, fit_dense(both(cell[0], factor), 2.0, slope=slope_of_both))


@WEIGHTS
def test_two_criteria_on_one_forward_pass_add_for_the_ggn(weights: str, factor: float) -> None:
    C = of("ggn")  # of a cross-entropy, whose GGN does not depend on the labels
    ours = fit(make(loss_weights=weights), half_and_third(1))
    same(ours, fit_dense(lambda m, x, y: factor * 1.3 * C(m, x, y), slope=slope_of_one))


@WEIGHTS
def test_two_criteria_on_one_forward_pass_form_one_term_gradient(weights: str, factor: float) -> None:
    def rows(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return dense.per_example_gradients(model, CE, x, y) + 0.3 * dense.per_example_gradients(model, CE, x, other(y))

    def joint(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        U = rows(model, x, y)
        return factor * U.T @ U / len(x)

    ours = fit(make("empirical_fisher", loss_weights=weights), half_and_third(1))
    same(ours, fit_dense(joint, slope=slope_of_one))
    EF = of("empirical_fisher")
    differ(ours, fit_dense(lambda m, x, y: factor * (EF(m, x, y) + 0.3 * EF(m, x, other(y))), slope=slope_of_one))


def test_given_weights_go_to_b_and_never_to_a() -> None:
    def tripled(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        (3.0 * criterion(model(x), y)).backward()
        optimizer.step()

    once, thrice = make(repr="kron_io", loss_weights="given"), make(repr="kron_io", loss_weights="given")
    fit(once, steps=1)
    fit(thrice, tripled, steps=1)
    for name in ("0", "2"):
        for degree, old, new in zip((1, 0), once.operators[name].factors, thrice.operators[name].factors, strict=True):
            assert_close(new.to_dense(), old.to_dense() * 3.0**degree, **EXACT)


def test_given_weights_of_a_sum_of_micro_batches_add() -> None:
    def summed(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        for half in (slice(0, 2), slice(2, 6)):
            criterion(model(x[half]), y[half]).backward()
        optimizer.step()

    preconditioner, (x, y) = make(loss_weights="given"), batches(1)[0]
    fit(preconditioner, summed, steps=1)
    assert_close(matrix_of(preconditioner), of("ggn")(net(), x[:2], y[:2]) + of("ggn")(net(), x[2:], y[2:]), **EXACT)


@pytest.mark.parametrize("cell", [("ggn", "full", "cholesky"), ("ggn", "kron_io", "cholesky"), ("ggn", "matrix_free", "cg")], ids="-".join)
def test_given_weights_divide_by_the_scaler_and_only_by_the_scaler(cell: tuple[str, str, str]) -> None:
    expected = fit(make(*cell, loss_weights="given"))
    scaler, loop = scaled()
    same(fit(make(*cell, loss_weights="given"), loop, scaler=scaler), expected)
    _, loop = scaled()
    differ(fit(make(*cell, loss_weights="given"), loop), expected)


@every
def test_two_backward_passes_over_one_graph_add(kind: str) -> None:
    def quarters(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        f = model(x)
        (criterion(f, y) * 0.25).backward(retain_graph=True)
        (criterion(f, y) * 0.75).backward()
        optimizer.step()

    same(fit(KINDS[kind](), quarters), fit(KINDS[kind]()))


@every
def test_one_loss_differentiated_twice_counts_twice(kind: str) -> None:
    def halves(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = criterion(model(x), y) / 2
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    same(fit(KINDS[kind](), halves), fit(KINDS[kind]()))


def test_one_loss_used_twice_in_a_sum_fires_once_with_the_sum() -> None:
    def doubled(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        (loss * 0.25 + loss * 0.75).backward()
        optimizer.step()

    preconditioner = make(loss_weights="given")
    same(fit(preconditioner, doubled), fit(make(loss_weights="given")))


def test_the_learning_rate_stays_the_optimizers() -> None:
    slow = fit(make(), optimizer=lambda m: sgd(m, lr=0.01), steps=1)
    assert_close((slow[0].weight - net()[0].weight) * 10, fit(make(), steps=1)[0].weight - net()[0].weight, **EXACT)
