"""Claims about `fisher_mc` (float64, no Monte-Carlo tolerance but in the one test of the rate).

- Its expectation over the labels IS the Fisher matrix: the sum over every joint labelling, weighted by its probability, equals the oracle's
  `fisher` for one and for three draws, dense and by products; weighted uniformly it does not.
- One labelling alone is not the Fisher matrix, and draws are divided by their number: twice the same labels give the matrix of one.
- The matrix is keyed by the seed: the same again for the same seed, another for another; products and blocks use the same labels.
- The error falls as one over the square root of the number of draws (identity 10).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from nets import CASES, labels, normal, seeded
from precond.likelihoods import Bernoulli, Categorical
from precond.matrices import FisherMC

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def build(outputs: int) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs)))


def matrix_of(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, samples: int = 1, repr: str = "full", seed: int = 0) -> Tensor:
    return precond.curvature(model, criterion, x, y, matrix=FisherMC(samples=samples), repr=repr, seed=seed).to_dense()


class Given:
    """Makes a likelihood draw the labels it is told, one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, likelihood: type[Categorical] | type[Bernoulli]) -> None:
        self.queue: Iterator[Tensor] = iter(())

        def sample(this: Categorical | Bernoulli, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
            drawn = this.gradient(output, next(self.queue))
            return drawn if isinstance(this, Categorical) else drawn / this._per_output(output) ** 0.5

        monkeypatch.setattr(likelihood, "sample", sample)


@pytest.mark.parametrize("repr", ["full", "matrix_free", "layer"])
@pytest.mark.parametrize(("count", "classes", "samples"), [(2, 3, 1), (1, 3, 3), (2, 2, 3)])
def test_the_expectation_over_all_labels_is_the_fisher_matrix(
    count: int, classes: int, samples: int, repr: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, criterion, x, y = build(classes), nn.CrossEntropyLoss(), normal(count, 2), labels(classes, count)
    p = dense.predict(model, x).softmax(1)
    given = Given(monkeypatch, Categorical)
    want = dense.fisher(model, criterion, x, y)
    expectation, uniform = torch.zeros_like(want), torch.zeros_like(want)
    draws = list(itertools.product(itertools.product(range(classes), repeat=count), repeat=samples))
    total = 0.0
    for draw in draws:
        given.queue = iter([torch.tensor(one) for one in draw])
        probability = torch.stack([p[i, label] for one in draw for i, label in enumerate(one)]).prod().item()
        M = matrix_of(model, criterion, x, y, samples, repr)
        assert next(given.queue, None) is None, "every label is drawn once"
        expectation, uniform, total = expectation + probability * M, uniform + M / len(draws), total + probability
    want = dense.project_layer(want, model) if repr == "layer" else want
    assert abs(total - 1) < 1e-12
    close(expectation, want)
    assert (uniform - want).norm() > 1e-3 * want.norm()


def test_the_expectation_over_all_bernoulli_labels_is_the_fisher_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion, x, y = build(2), nn.BCEWithLogitsLoss(), normal(2, 2), labels(2, 2, 2).double()
    p, given = dense.predict(model, x).sigmoid(), Given(monkeypatch, Bernoulli)
    expectation = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=4):
        drawn = torch.tensor(bits, dtype=torch.float64).reshape(2, 2)
        given.queue = iter([drawn])
        expectation = expectation + torch.where(drawn > 0, p, 1 - p).prod() * matrix_of(model, criterion, x, y)
    close(expectation, dense.fisher(model, criterion, x, y))


def test_one_labelling_is_not_the_fisher_matrix() -> None:
    case = CASES["mlp"]
    M = matrix_of(case.make(), case.criterion, case.inputs, case.targets)
    assert (M - dense.fisher(case.make(), case.criterion, case.inputs, case.targets)).norm() > 0.1 * M.norm()


def test_draws_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion, x, y = build(3), nn.CrossEntropyLoss(), normal(4, 2), labels(3, 4)
    given, drawn = Given(monkeypatch, Categorical), labels(3, 4, seed=9)
    given.queue = iter([drawn] * 4)
    close(matrix_of(model, criterion, x, y, 3), matrix_of(model, criterion, x, y, 1))


@pytest.mark.parametrize("name", ["mlp", "transformer", "bce", "mse"])
def test_the_seed_keys_the_labels(name: str) -> None:
    case = CASES[name]
    first, again, other = (matrix_of(case.make(), case.criterion, case.inputs, case.targets, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3, atol=1e-3)
    close(matrix_of(case.make(), case.criterion, case.inputs, case.targets, repr="matrix_free", seed=1), first)


def test_without_a_seed_the_global_generator_says_which_labels_and_is_put_back() -> None:
    case = CASES["mlp"]

    def drawn() -> Tensor:
        return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix="fisher_mc", repr="full").to_dense()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = drawn()
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert torch.equal(drawn(), first)
        torch.manual_seed(2)
        assert not torch.equal(drawn(), first)


def test_the_error_halves_when_the_draws_are_quadrupled() -> None:
    """Mean squared errors of 40 repeats: their ratio is 4 +- 0.9 (a relative standard error below 0.25 of each, and fixed seeds)."""
    model, criterion, x, y = build(3), nn.CrossEntropyLoss(), normal(4, 2), labels(3, 4)
    exact = dense.fisher(model, criterion, x, y)

    def error(samples: int) -> float:
        errors = [(matrix_of(model, criterion, x, y, samples, seed=seed) - exact).square().sum() for seed in range(40)]
        return torch.stack(errors).mean().item()

    assert 3.0 < error(4) / error(16) < 5.5


def test_at_least_one_label_is_drawn() -> None:
    with pytest.raises(ValueError, match="at least one label"):
        FisherMC(samples=0)
