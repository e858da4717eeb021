"""Claims of `batched_empirical_fisher` scaled by the number of terms, N g g^T, exact to 1e-10; scale=1 is the control throughout.

- N is the number of terms: rows, sequence positions that are not ignored, weights of classes; 1 where the loss is a sum.
- It does not depend on how a batch is split (accumulation, batches, ranks' weights) nor on AMP's scale; in the matrix g is as the loop
  made it. "given" weights multiply the matrix once.
- Two criteria on one forward pass form one term gradient, so that its terms count once; on two halves of a batch they are N all the same.
- Over all labels of a model, drawn for each term, the mean of N g g^T is the Fisher matrix, and that of g g^T is not (identity 6).
- It needs the criterion; other scales are refused.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_derived
import precond
from nets import CASES, Case, labels, normal
from precond.matrices import BatchedEmpiricalFisher
from training import accumulate, batches, differ, fit, fit_dense, make, matrix_of, net, same

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE = nn.CrossEntropyLoss()
BY_TERMS = BatchedEmpiricalFisher(scale="terms")


def curve(case: Case, matrix: Any = BY_TERMS, repr: str = "full", **data: Any) -> Tensor:
    data = data or {"inputs": case.inputs, "targets": case.targets}
    return precond.curvature(case.make(), case.criterion, matrix=matrix, repr=repr, **data).to_dense()


def oracle(case: Case) -> Tensor:
    return dense_derived.batched_by_terms(case.make(), case.criterion, case.inputs, case.targets)


WEIGHTED = Case("weighted", net, nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]).double()), normal(6, 4), labels(3, 6))


NAMES = ("mlp", "conv", "transformer", "transformer_ignore", "mse", "mse_sum", "bce")


@pytest.mark.parametrize("case", [*(CASES[name] for name in NAMES), WEIGHTED], ids=lambda case: case.name)
def test_it_is_the_square_of_the_gradient_times_the_number_of_terms(case: Case) -> None:
    got, plain = curve(case), curve(case, "batched_empirical_fisher")
    close(got, oracle(case))
    terms = dense.terms(case.criterion, dense.predict(case.make(), case.inputs), case.targets)
    assert terms > 2
    close(got, plain * (terms if case.criterion.reduction == "mean" else 1))


def test_terms_are_not_examples() -> None:
    case = CASES["transformer_ignore"]
    assert dense.terms(case.criterion, dense.predict(case.make(), case.inputs), case.targets) == 11 and len(case.inputs) == 3


@pytest.mark.parametrize("name", ["mlp", "mse_sum"])
def test_batches_of_unequal_sizes_are_one_batch(name: str) -> None:
    case = CASES[name]
    pieces = [(case.inputs[s], case.targets[s]) for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    close(curve(case, batches=pieces), curve(case))


# -- loops -------------------------------------------------------------------------------------------------------------


def trained(loop: Any = None, scaler: Any = None, **options: Any) -> nn.Module:
    return fit(make(BY_TERMS, "full", damping=1.0, **options), **({} if loop is None else {"loop": loop}), scaler=scaler)


def weighted(weight: float, scaler: Any) -> Any:
    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(weight * criterion(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()

    return loop


def once(loop: Any, scaler: Any = None, **options: Any) -> Tensor:
    p = make(BY_TERMS, "full", **options)
    fit(p, loop, steps=1, scaler=scaler)
    return matrix_of(p)


def test_steps_are_those_of_dense_algebra() -> None:
    same(trained(), fit_dense(lambda model, x, y: dense_derived.batched_by_terms(model, CE, x, y), 1.0))
    differ(trained(), fit(make("batched_empirical_fisher", "full", damping=1.0)))


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (1, 2, 3)], ids=str)
def test_micro_batches_are_one_batch(sizes: tuple[int, ...]) -> None:
    same(trained(accumulate(*sizes)), trained())


def test_the_scale_of_amp_does_not_matter_and_given_weights_count_once() -> None:
    x, y = batches(1)[0]
    plain = dense_derived.batched_by_terms(net(), CE, x, y)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=1024.0)

    for loss_weights, factor in (("normalised", 9.0), ("given", 3.0)):
        s = scaler()
        close(once(weighted(3.0, s), s, loss_weights=loss_weights), factor * plain)
    s = scaler()
    close(once(weighted(1.0, s), s), plain)


def test_two_criteria_on_one_pass_form_one_term_and_halves_of_a_batch_do_not() -> None:
    x, y = batches(1)[0]
    z = (y + 1) % 3

    def joint(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        f = model(x)
        (criterion(f, y) + 0.3 * criterion(f, z)).backward()
        optimizer.step()

    def halves(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        (criterion(model(x[:3]), y[:3]) / 2 + criterion(model(x[3:]), y[3:]) / 2).backward()
        optimizer.step()

    g = dense.gradient(net(), CE, x, y) + 0.3 * dense.gradient(net(), CE, x, z)
    close(once(joint), len(x) * torch.outer(g, g))
    close(once(halves), dense_derived.batched_by_terms(net(), CE, x, y))


# -- 6 -----------------------------------------------------------------------------------------------------------------


def test_6_its_mean_over_the_labels_of_the_model_is_the_fisher_matrix() -> None:
    x = normal(3, 4)
    logs = dense.predict(net(), x).log_softmax(1)
    mean, plain = 0, 0
    for drawn in itertools.product(range(3), repeat=3):
        y = torch.tensor(drawn)
        probability = logs.gather(1, y.unsqueeze(1)).sum().exp()
        case = Case("drawn", net, CE, x, y)
        mean, plain = mean + probability * curve(case), plain + probability * curve(case, "batched_empirical_fisher")
    fisher = dense.fisher(net(), CE, x, y)
    close(mean, fisher)
    close(3 * plain, fisher)
    assert (plain - fisher).norm() > 0.5 * fisher.norm()


def test_it_needs_the_criterion_and_a_known_scale() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make("batched_empirical_fisher", "full").attach(model, None, optimizer).remove()
    with pytest.raises(precond.UsageError, match="made of the criterion's calls"):
        make(BY_TERMS, "full").attach(model, None, optimizer)
    with pytest.raises(ValueError, match=r"scale='examples'.*choose 1 or 'terms'"):
        BatchedEmpiricalFisher(scale="examples")
