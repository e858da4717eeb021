"""Claims about the options of criteria, in float64 to 1e-10: each is honoured in all that curvature is made of.

- Class weights, label smoothing, targets in probabilities and ignored targets of `nn.CrossEntropyLoss`, alone and together, in every
  layout; weights and positive weights of `nn.BCEWithLogitsLoss`; every form of a given variance, `eps` and `full` of
  `nn.GaussianNLLLoss`. For a mean and a sum: `scale` times the gradient, the product and S S^T are autograd's gradient and Hessian of
  the criterion itself.
- Labels are those of the model and are scored by the plain -log p, times the root of the term's weight: their expectation by enumeration is
  the Hessian of each term, and what `sample` gives is one of them. With smoothed or weighted targets in their place it is not.
- Smoothing alone changes no curvature; with class weights it does. A mean over weighted classes divides by the weights of the labels.
- What is changed on the criterion after `attach` counts at the next call. What cannot be modelled is refused by name.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_terms
import precond
from nets import labels, normal
from precond import ObservationError, likelihoods
from precond.likelihoods import Categorical, GaussianNLL, Likelihood, exact_columns
from training import EXACT, batches, make, net, of

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

Loss = Callable[[Tensor], Tensor]
W = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
LAYOUTS = [(3,), (4, 3), (2, 3, 4), (2, 3, 2, 2)]


def indices(shape: tuple[int, ...]) -> Tensor:
    return labels(3, *(() if len(shape) == 1 else (shape[0], *shape[2:])), seed=3)


def probabilities(shape: tuple[int, ...]) -> Tensor:
    return normal(*shape, seed=4).softmax(min(1, len(shape) - 1))


CASES: list[Any] = []


def case(criterion: nn.Module, shape: tuple[int, ...], name: str, target: Tensor, *more: Any) -> None:
    for reduction in ("mean", "sum"):
        one = copy.copy(criterion)
        one.reduction = reduction
        CASES.append(pytest.param(one, normal(*shape, seed=8), target, more, id=f"{name}-{len(shape)}d-{reduction}"))


for shape in LAYOUTS:
    case(nn.CrossEntropyLoss(weight=W), shape, "weight", indices(shape))
    case(nn.CrossEntropyLoss(label_smoothing=0.3), shape, "smoothing", indices(shape))
    case(nn.CrossEntropyLoss(weight=W, label_smoothing=0.3), shape, "weight+smoothing", indices(shape))
    case(nn.CrossEntropyLoss(), shape, "soft", probabilities(shape))
    case(nn.CrossEntropyLoss(weight=W), shape, "soft+weight", probabilities(shape))
    case(nn.CrossEntropyLoss(weight=W, label_smoothing=0.3), shape, "soft+weight+smoothing", probabilities(shape))
    case(nn.CrossEntropyLoss(), shape, "soft, no sum of 1", 2 * probabilities(shape) ** 2)
for index, extra in itertools.product(
    (-100, -1, 1, 255), ({}, {"weight": W}, {"label_smoothing": 0.3}, {"weight": W, "label_smoothing": 0.3})
):
    target = labels(3, 4, 2, seed=5)
    if index != 1:
        target[0, 1] = target[2, 0] = index
    case(nn.CrossEntropyLoss(ignore_index=index, **extra), (4, 3, 2), f"ignore {index}+{'+'.join(extra)}", target)
for shape in [(4,), (4, 3), (2, 4, 3)]:
    bits, row = labels(2, *shape, seed=6).double(), W if len(shape) > 1 else normal(4, seed=7).abs()
    case(nn.BCEWithLogitsLoss(weight=row), shape, "bce weight", bits)
    case(nn.BCEWithLogitsLoss(pos_weight=row), shape, "bce pos_weight", bits)
    case(
        nn.BCEWithLogitsLoss(weight=normal(*shape, seed=9).abs(), pos_weight=row), shape, "bce both, soft", normal(*shape, seed=5).sigmoid()
    )
    y, v = normal(*shape, seed=6), normal(*shape, seed=7).abs() + 0.1
    case(nn.GaussianNLLLoss(), shape, "nll number", y, 0.7)
    case(nn.GaussianNLLLoss(full=True), shape, "nll full", y, v)
    case(nn.GaussianNLLLoss(eps=0.5), shape, "nll eps", y, v)
    if len(shape) > 1:
        case(nn.GaussianNLLLoss(), shape, "nll by row", y, v[..., 0])
        case(nn.GaussianNLLLoss(), shape, "nll by row, kept", y, v[..., :1])
each_case = pytest.mark.parametrize(("criterion", "output", "target", "more"), CASES)


def seen(criterion: nn.Module, output: Tensor, more: tuple[Any, ...]) -> Likelihood:
    return likelihoods.resolve(criterion).given(output, *more)[0]


def hessian(loss: Loss, output: Tensor) -> Tensor:
    return torch.func.hessian(lambda flat: loss(flat.reshape(output.shape)))(output.flatten())


@each_case
def test_scale_divides_the_sum_into_the_loss(criterion: nn.Module, output: Tensor, target: Tensor, more: tuple[Any, ...]) -> None:
    total = copy.copy(criterion)
    total.reduction = "sum"
    likelihood = seen(criterion, output, more)
    terms = likelihood.terms(output, target)
    assert [a for a, b in zip(terms.shape, output.shape, strict=True) if a != b] == [1] * len(likelihood.event(output))
    per_term = (
        1.0 if isinstance(likelihood, Categorical) or criterion.reduction == "sum" else 1 / (output.shape[-1] if output.dim() > 1 else 1)
    )
    close(criterion(output, target, *more), total(output, target, *more) * per_term * likelihood.scale(output, target))


@each_case
def test_gradient_product_and_factor_are_autograds(criterion: nn.Module, output: Tensor, target: Tensor, more: tuple[Any, ...]) -> None:
    likelihood, leaf = seen(criterion, output, more), output.clone().requires_grad_()
    scale, v = likelihood.scale(output, target), normal(*output.shape, seed=9)
    (want,) = torch.autograd.grad(criterion(leaf, target, *more), leaf)
    H = hessian(lambda f: criterion(f, target, *more), output)
    close(scale * likelihood.gradient(output, target), want)
    close((scale * likelihood.hessian_product(output, target, v)).flatten(), H @ v.flatten())
    batch = output.shape[0] if output.dim() > 1 or not isinstance(likelihood, Categorical) else 1
    columns = exact_columns(likelihood, output, target, batch).reshape(-1, batch, output.numel() // batch)
    close(torch.block_diag(*(scale * torch.einsum("kni,knj->nij", columns, columns))), H)


@each_case
def test_labels_of_the_model_have_mean_zero_and_the_hessian_as_covariance(
    criterion: nn.Module, output: Tensor, target: Tensor, more: tuple[Any, ...]
) -> None:
    likelihood = seen(criterion, output, more)
    drawn = likelihood.sample(output, target, torch.Generator().manual_seed(5))
    scale, H = likelihood.scale(output, target), hessian(lambda f: criterion(f, target, *more), output)
    if isinstance(likelihood, GaussianNLL):  # a linear map of standard normal numbers
        noise = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        close(((drawn / noise).square() * scale).flatten().diag(), H)
        return
    weights, flat = dense_terms.curvature_weights(criterion, output, target), dense_terms.rows(criterion, output)
    order = dense_terms.rows(criterion, torch.arange(output.numel()).reshape(output.shape))
    for row, weight, got, place in zip(flat, weights, dense_terms.rows(criterion, drawn), order, strict=True):
        one = row.clone().requires_grad_()
        every = [(p, torch.autograd.grad(loss, one, retain_graph=True)[0]) for p, loss in dense_terms.model_labels(criterion, one, weight)]
        close(sum(p * g for p, g in every), torch.zeros_like(row))
        close(scale * sum(p * torch.outer(g, g) for p, g in every), H[place][:, place])
        assert any(torch.allclose(got, g, rtol=0, atol=1e-12) for _, g in every)


def test_smoothing_alone_changes_no_curvature_and_with_class_weights_it_does() -> None:
    f, y = normal(4, 3), labels(3, 4)
    plain, smooth = Categorical(), Categorical(label_smoothing=0.3)
    for a, b in zip(plain.factor(f, y), smooth.factor(f, y), strict=True):
        close(a, b)
    v = normal(4, 3, seed=3)
    weighted, both = (Categorical(weight=W, label_smoothing=e).hessian_product(f, y, v) for e in (0.0, 0.3))
    assert (weighted - both).norm() > 0.05
    drawn = [likelihood.sample(f, y, torch.Generator().manual_seed(1)) for likelihood in (plain, smooth)]
    assert torch.equal(*drawn)


OPTIONS = [pytest.param(c, t, id=f"{c.reduction}-{n}") for n, c, t in (
    ("weight", nn.CrossEntropyLoss(weight=W), None),
    ("all", nn.CrossEntropyLoss(weight=W, label_smoothing=0.2, ignore_index=1), None),
    ("sum", nn.CrossEntropyLoss(weight=W, label_smoothing=0.2, reduction="sum"), None),
    ("soft", nn.CrossEntropyLoss(weight=W), normal(6, 3, seed=4).softmax(1)),
    ("bce", nn.BCEWithLogitsLoss(weight=W, pos_weight=W.flip(0)), labels(2, 6, 3).double()),
)]  # fmt: skip
SQUARES = ("empirical_fisher", "batched_empirical_fisher")


@pytest.mark.parametrize("repr", ["full", "matrix_free"])
@pytest.mark.parametrize("matrix", ["ggn", "fisher", "hessian", *SQUARES])
@pytest.mark.parametrize(("criterion", "target"), OPTIONS)
def test_curvature_honours_the_options(criterion: nn.Module, target: Tensor | None, matrix: str, repr: str) -> None:
    if (matrix, repr) == ("batched_empirical_fisher", "matrix_free"):
        repr = "layer"
    x, y = batches(1)[0]
    y = y if target is None else target
    got = precond.curvature(net(), criterion, x, y, matrix=matrix, repr=repr).to_dense()
    want = of(matrix, criterion)(net(), x, y)
    close(got, dense.project_layer(want, net()) if repr == "layer" else want)
    if criterion.reduction == "mean":
        halves = [(x[:2], y[:2]), (x[2:], y[2:])]
        close(precond.curvature(net(), criterion, batches=halves, matrix=matrix, repr=repr).to_dense(), got)


def test_class_weights_square_in_the_empirical_fisher() -> None:
    (x, y), c = batches(1)[0], 1.7
    y = torch.full_like(y, 1)
    for matrix, degree in (("ggn", 1), ("empirical_fisher", 2)):
        weighted = nn.CrossEntropyLoss(weight=torch.full((3,), c, dtype=torch.float64), reduction="sum")
        got = [
            precond.curvature(net(), each, x, y, matrix=matrix, repr="full").to_dense()
            for each in (weighted, nn.CrossEntropyLoss(reduction="sum"))
        ]
        close(got[0], c**degree * got[1])


def test_an_option_changed_on_the_criterion_counts_at_the_next_call() -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), batches(1)[0]
    preconditioner = make("ggn").attach(model, criterion)
    criterion.weight = W
    criterion(model(x), y).backward()
    preconditioner.step()
    torch.testing.assert_close(preconditioner.operators["model"].to_dense(), of("ggn", criterion)(net(), x, y), **EXACT)


def test_what_cannot_be_modelled_is_refused_by_name() -> None:
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) ** 2

    class Named(nn.CrossEntropyLoss):
        pass

    with pytest.raises(ObservationError, match=r"Focal computes another loss than nn\.CrossEntropyLoss"):
        likelihoods.resolve(Focal())
    assert isinstance(likelihoods.resolve(Named()), Categorical)
    with pytest.raises(ObservationError, match=r"CrossEntropyLoss\(weight=\.\.\.\) holds negative numbers"):
        likelihoods.resolve(nn.CrossEntropyLoss(weight=-W))
    with pytest.raises(ObservationError, match=r"shape \(4, 1\) and targets of shape \(4,\), which broadcast"):
        likelihoods.resolve(nn.MSELoss()).scale(normal(4, 1), normal(4))
    with pytest.raises(ObservationError, match="not further arguments"):
        likelihoods.resolve(nn.MSELoss()).given(normal(4), normal(4))
    with pytest.raises(ObservationError, match=r"give the targets as the pair \(target, var\)"):
        likelihoods.resolve(nn.GaussianNLLLoss()).given(normal(4))
    with pytest.raises(ObservationError, match="was given no variance"):
        GaussianNLL().gradient(normal(4), normal(4))
