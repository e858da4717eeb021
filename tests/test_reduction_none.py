"""Claims about `reduction="none"` and the user's own mean (design rule 1), in float64 to 1e-10.

- `criterion(f, y).mean()` is reduction="mean": the same matrix and the same steps, for every criterion, kind of observation and both
  settings of `loss_weights`; a mask divided by its sum is `ignore_index`; so is `loss.sum() / counted` with ignored targets.
- Weights G of terms enter the GGN, the Fisher and the Hessian as sum G C / sum G, the empirical Fisher as sum G^2 g g^T / sum G^2; a
  constant factor of the loss, AMP's included, is in the weight of the call alone. Micro-batches of unequal masks are one batch.
- Drawn labels have the weighted Fisher matrix as their expectation.
- A call whose terms are all masked adds nothing. Weights of both signs are refused. A functional loss that is not reduced works through
  `observe`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import dense
import precond
from nets import CASES, labels, normal
from precond import ObservationError, likelihoods
from precond.observe import columns
from training import EXACT, KINDS, batches, differ, fit, make, net, of, same, sgd

Reduce = Callable[[Tensor, Tensor], Tensor]
W = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


def reduced(reduce: Reduce) -> Any:
    """The plain loop, with a mean of the user's own."""

    def loop(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        reduce(criterion(model(x), y), y).backward()
        optimizer.step()

    return loop


def mean(losses: Tensor, y: Tensor) -> Tensor:
    return losses.mean()


PAIRS = {
    "ce": (nn.CrossEntropyLoss, lambda y: y),
    "mse": (nn.MSELoss, lambda y: F.one_hot(y, 3).double()),
    "bce": (nn.BCEWithLogitsLoss, lambda y: F.one_hot(y, 3).double()),
}


def data(name: str, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(x, PAIRS[name][1](y)) for x, y in batches(steps)]


@pytest.mark.parametrize("weights", ["normalised", "given"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_users_mean_is_the_mean(kind: str, name: str, weights: str) -> None:
    if weights == "given" and kind not in ("ggn_full", "ef_full", "kfac"):
        kind = "ggn_full"
    made = {"ggn_full": ("ggn", "full"), "ef_full": ("empirical_fisher", "full"), "kfac": ("ggn", "kron_io")}
    build = (lambda: make(*made[kind], loss_weights="given")) if weights == "given" else KINDS[kind]
    same(
        fit(build(), reduced(mean), criterion=PAIRS[name][0](reduction="none"), data=data(name)),
        fit(build(), criterion=PAIRS[name][0](), data=data(name)),
    )


IGNORED = torch.tensor([True, False, True, True, False, True])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_over_its_sum_is_ignore_index(kind: str) -> None:
    masked = [(x, torch.where(IGNORED, y, -100)) for x, y in batches()]
    want = fit(KINDS[kind](), data=masked)
    none = nn.CrossEntropyLoss(reduction="none")
    same(fit(KINDS[kind](), reduced(lambda losses, y: (losses * IGNORED).sum() / IGNORED.sum()), criterion=none), want)
    same(fit(KINDS[kind](), reduced(lambda losses, y: losses[IGNORED].mean()), criterion=none), want)
    same(fit(KINDS[kind](), reduced(lambda losses, y: losses.sum() / (y != -100).sum()), criterion=none, data=masked), want)
    differ(fit(KINDS[kind](), reduced(mean), criterion=none), want)


def test_the_users_mean_over_class_weights_is_torchs() -> None:
    one, none = nn.CrossEntropyLoss(weight=W), nn.CrossEntropyLoss(weight=W, reduction="none")
    same(fit(make(), reduced(lambda losses, y: losses.sum() / W[y].sum()), criterion=none), fit(make(), criterion=one))


C = torch.tensor([0.5, 0.0, 2.0, 0.1, 1.0, 0.4], dtype=torch.float64)


def weighted(matrix: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The matrix of sum_i C_i l_i over the sum of C, by the oracle."""
    total = C.sum()
    if matrix == "empirical_fisher":
        U = C.unsqueeze(1) * dense.per_example_gradients(model, nn.CrossEntropyLoss(), x, y)
        return U.T @ U / C.square().sum()
    each = [of(matrix)(model, x[i : i + 1], y[i : i + 1]) for i in range(6)]
    return sum(c * M for c, M in zip(C, each, strict=True)) / total


@pytest.mark.parametrize("setting", ["normalised", "given"])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
@pytest.mark.parametrize("matrix", ["ggn", "fisher", "hessian", "empirical_fisher"])
@pytest.mark.parametrize("repr", ["full", "layer"])
def test_weights_of_terms_enter_as_the_oracle_has_them(matrix: str, repr: str, factor: float, setting: str) -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(reduction="none"), batches(1)[0]
    preconditioner = make(matrix, repr, "lu", 2.0, loss_weights=setting).attach(model, criterion)
    (factor * (criterion(model(x), y) * C).sum()).backward()
    preconditioner.step()
    want = weighted(matrix, net(), x, y) * (1.0 if setting == "normalised" else factor * C.sum())
    if repr == "layer":
        want = dense.project_layer(want, net())
        got = torch.block_diag(*(preconditioner.operators[name].to_dense() for name in ("0", "2")))
    else:
        got = preconditioner.operators["model"].to_dense()
    assert_close(got, want, **EXACT)


WEIGHTS = {"mask": IGNORED.double(), "numbers": C}
SQUARES = ("ef_full", "ef_kron", "kfac")  # a square of a weight, and the rows of A, are additive over masks alone


@pytest.mark.parametrize(("kind", "weights"), [(k, w) for k, w in itertools.product(KINDS, WEIGHTS) if w == "mask" or k not in SQUARES])
def test_micro_batches_of_unequal_weights_are_one_batch(kind: str, weights: str) -> None:
    c = WEIGHTS[weights]

    def parts(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
            (criterion(model(x[part]), y[part]) * c[part]).sum().div(c.sum()).backward()
        optimizer.step()

    none = nn.CrossEntropyLoss(reduction="none")
    whole = reduced(lambda losses, y: (losses * c).sum() / c.sum())
    same(fit(KINDS[kind](), parts, criterion=none), fit(KINDS[kind](), whole, criterion=none))


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "hessian"])
def test_a_micro_batch_that_is_masked_whole_adds_nothing(matrix: str) -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(reduction="none"), batches(1)[0]
    preconditioner = make(matrix, "full", "lu", 2.0).attach(model, criterion)
    criterion(model(x), y).mean().backward()
    (criterion(model(x), y) * torch.zeros(6)).sum().backward()
    criterion(model(x), torch.full_like(y, -100)).sum().backward()
    preconditioner.step()
    assert_close(preconditioner.operators["model"].to_dense(), of(matrix)(net(), x, y), **EXACT)


def test_drawn_labels_of_weighted_terms_have_the_weighted_fisher_matrix_as_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 27 labellings of three examples, each with its probability."""
    x, y, c = normal(3, 4), labels(3, 3), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    p, expectation, inner = dense.predict(net(), x).softmax(1), torch.zeros(43, 43, dtype=torch.float64), likelihoods.Categorical
    for drawn in itertools.product(range(3), repeat=3):
        monkeypatch.setattr(inner, "sample", lambda self, f, t, g, d=drawn: self.gradient(f, torch.tensor(d)))
        model, criterion = net(), nn.CrossEntropyLoss(reduction="none")
        preconditioner = make("fisher_mc").attach(model, criterion)
        ((criterion(model(x), y) * c).sum() / c.sum()).backward()
        preconditioner.step()
        expectation += p[range(3), drawn].prod() * preconditioner.operators["model"].to_dense()
    want = sum(ci * of("fisher")(net(), x[i : i + 1], y[i : i + 1]) for i, ci in enumerate(c)) / c.sum()
    assert_close(expectation, want, **EXACT)


@pytest.mark.parametrize("name", ["transformer", "transformer_ignore", "mse", "bce", "conv"])
@pytest.mark.parametrize("matrix", ["ggn", "fisher", "hessian", "empirical_fisher", "batched_empirical_fisher"])
def test_curvature_of_an_unreduced_criterion_is_that_of_its_mean(name: str, matrix: str) -> None:
    case = CASES[name]
    none = type(case.criterion)(reduction="none")
    got, want = (
        precond.curvature(case.make(), c, case.inputs, case.targets, matrix=matrix, repr="layer").to_dense() for c in (none, case.criterion)
    )
    assert_close(got, want, **EXACT)
    batched = precond.curvature(
        case.make(), none, batches=[(case.inputs[:1], case.targets[:1]), (case.inputs[1:], case.targets[1:])], matrix=matrix, repr="layer"
    )
    assert_close(batched.to_dense(), want, **EXACT)


def test_weights_of_both_signs_are_refused() -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(reduction="none"), batches(1)[0]
    _held = make().attach(model, criterion)
    with pytest.raises(ObservationError, match="with both signs"):
        (criterion(model(x), y) * (C - 0.5)).sum().backward()


def test_a_functional_loss_that_is_not_reduced() -> None:
    model, preconditioner = net(), make()
    optimizer = sgd(model)
    preconditioner.attach(model, "categorical", optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        f = model(x)
        losses = F.cross_entropy(f, y, reduction="none")
        preconditioner.observe(losses, f, y)
        losses.mean().backward()
        optimizer.step()
    same(model, fit(make()))


def test_the_columns_of_masked_terms_are_zero() -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(reduction="none"), batches(1)[0]
    preconditioner = make().attach(model, criterion)
    (criterion(model(x), y) * IGNORED).sum().backward()
    found = columns(preconditioner._session.observer if hasattr(preconditioner, "_session") else preconditioner._observer, 0)
    g = found.parts[0].layers["2"][0].grad
    assert g is not None and not g[:, ~IGNORED].any() and g[:, IGNORED].any()


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_an_unreduced_criterion_beside_a_reduced_one_on_the_same_output(matrix: str) -> None:
    found = []
    for none in (True, False):
        model, (x, y) = net(), batches(1)[0]
        criteria = [nn.CrossEntropyLoss(reduction="none" if none else "mean"), nn.MSELoss()]
        preconditioner, f = make(matrix, loss_weights="given").attach(model, criteria), model(x)
        (criteria[0](f, y).mean() + 0.3 * criteria[1](f, F.one_hot(y, 3).double())).backward()
        preconditioner.step()
        found.append(preconditioner.operators["model"].to_dense())
    assert_close(*found, **EXACT)
