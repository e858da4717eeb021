"""Claims about likelihoods, in float64 to 1e-10, for every member of the registry, both reductions and every layout.

- `terms` and `scale`: the loss as given is scale * the sum of the term losses, with terms the rows of the layout that count.
- `gradient`, `hessian_product` and the columns of `factor` are per term and unscaled: times `scale` they are autograd's gradient and
  Hessian of the criterion itself, S S^T == Hessian; the softmax's columns sum to 0.
- Drawn gradients have mean zero and covariance equal to the Hessian of the term: by enumeration of the labels (categorical, Bernoulli),
  and for the normal by its draw being a linear map of standard normal numbers whose covariance is that. The draw is that of the generator.
- Ignored terms count nowhere. Probabilities are formed in float32 at least, and extreme logits stay finite.
- Criteria that are not modelled are refused by name. A member of the registry without cases here fails a test; options of criteria
  and the variance of `nn.GaussianNLLLoss` have theirs in `test_likelihoods_options.py`, reduction="none" in `test_reduction_none.py`.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense_terms
from nets import labels, normal
from precond import ObservationError, UnknownName, likelihoods
from precond.likelihoods import Bernoulli, Categorical, Likelihood, Normal, exact_columns

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

CRITERIA: dict[str, Any] = {"categorical": nn.CrossEntropyLoss, "normal": nn.MSELoss, "bernoulli": nn.BCEWithLogitsLoss}
LAYOUTS: dict[str, list[tuple[int, ...]]] = {
    "categorical": [(3,), (4, 3), (2, 3, 4), (2, 3, 2, 2)],
    "normal": [(4,), (4, 3), (2, 4, 3)],
    "bernoulli": [(4,), (4, 3), (2, 4, 3)],
}


def target_for(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "categorical":
        return labels(shape[0 if len(shape) == 1 else 1], *(shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])))
    return normal(*shape, seed=7) if name == "normal" else labels(2, *shape, seed=7).double()


CASES = [
    pytest.param(criterion(reduction=reduction), normal(*shape, seed=8), target_for(name, shape), id=f"{name}-{reduction}-{len(shape)}d")
    for name, criterion in CRITERIA.items()
    for reduction in ("mean", "sum")
    for shape in LAYOUTS[name]
]
_PART = labels(3, 2, 4)
_PART[0, 1:3] = -100
_SEVEN = torch.where(_PART == -100, 2, _PART)
CASES += [
    pytest.param(nn.CrossEntropyLoss(reduction=reduction, ignore_index=index), normal(2, 3, 4), target, id=f"ignore-{index}-{reduction}")
    for reduction in ("mean", "sum")
    for index, target in ((-100, _PART), (2, _SEVEN))
]
each_case = pytest.mark.parametrize(("criterion", "output", "target"), CASES)


def hessian(criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """Of the loss as given, in the flattened output."""
    return torch.func.hessian(lambda flat: criterion(flat.reshape(output.shape), target))(output.flatten())


def test_every_likelihood_has_cases() -> None:
    assert set(likelihoods.REGISTRY.names()) == {*CRITERIA, "gaussian_nll"}
    for name, criterion in CRITERIA.items():
        assert likelihoods.REGISTRY.get(name).criterion is criterion
        assert type(likelihoods.resolve(criterion())) is likelihoods.REGISTRY.get(name)
        assert likelihoods.resolve(name).reduction == "mean"


@each_case
def test_terms_and_scale_say_what_the_loss_is(criterion: nn.Module, output: Tensor, target: Tensor) -> None:
    likelihood = likelihoods.resolve(criterion)
    assert float(likelihood.total(output, target)) == dense_terms.terms(criterion, output, target)
    assert likelihood.scale(output, target).dim() == 0
    losses = dense_terms.term_losses(criterion, output, target)
    close(likelihood.scale(output, target) * losses.sum(), criterion(output, target))


@each_case
def test_the_gradient_is_autograds(criterion: nn.Module, output: Tensor, target: Tensor) -> None:
    likelihood, leaf = likelihoods.resolve(criterion), output.clone().requires_grad_()
    (want,) = torch.autograd.grad(criterion(leaf, target), leaf)
    got = likelihood.gradient(output, target)
    close(likelihood.scale(output, target) * got, want)
    assert got.abs().max() > 1e-3 and got.shape == output.shape


@each_case
def test_the_product_is_with_autograds_hessian(criterion: nn.Module, output: Tensor, target: Tensor) -> None:
    likelihood, v = likelihoods.resolve(criterion), normal(*output.shape, seed=9)
    got = likelihood.scale(output, target) * likelihood.hessian_product(output, target, v)
    close(got.flatten(), hessian(criterion, output, target) @ v.flatten())


@each_case
def test_the_factor_is_a_root_of_the_hessian(criterion: nn.Module, output: Tensor, target: Tensor) -> None:
    """A column holds a class of all terms at once: terms apart, so that there are no cross products."""
    likelihood = likelihoods.resolve(criterion)
    columns = torch.stack(list(likelihood.factor(output, target)))
    each = torch.stack([dense_terms.rows(criterion, column) for column in columns])  # (classes, terms, event)
    blocks = likelihood.scale(output, target) * torch.einsum("ktc,ktd->tcd", each, each)
    order = dense_terms.rows(criterion, torch.arange(output.numel()).reshape(output.shape)).flatten()
    H = hessian(criterion, output, target)[order][:, order]
    close(torch.block_diag(*blocks), H)
    if isinstance(likelihood, Categorical):
        close(each.sum(2), torch.zeros_like(each.sum(2)))
    else:
        assert columns.sum((0,)).abs().min() > 1e-3


@each_case
def test_exact_columns_of_examples_are_apart(criterion: nn.Module, output: Tensor, target: Tensor) -> None:
    """One column a position and class: S S^T of one example is its whole Hessian, positions included."""
    batch = output.shape[0] if output.dim() > 1 else 1 if isinstance(criterion, nn.CrossEntropyLoss) else output.shape[0]
    likelihood = likelihoods.resolve(criterion)
    columns = exact_columns(likelihood, output, target, batch).reshape(-1, batch, output.numel() // batch)
    blocks = likelihood.scale(output, target) * torch.einsum("kni,knj->nij", columns, columns)
    close(torch.block_diag(*blocks), hessian(criterion, output, target))


def drawn_labels(likelihood: Likelihood, output: Tensor, target: Tensor) -> list[tuple[float, Tensor]]:
    """(probability, the gradient of -log p) of every label of one term: rows of output are given in the layout of one term."""
    if isinstance(likelihood, Categorical):
        p = output.softmax(-1).flatten()
        return [(float(p[c]), likelihood.gradient(output, torch.full_like(target, c))) for c in range(len(p))]
    p = output.sigmoid().flatten()
    found = []
    for bits in itertools.product((0.0, 1.0), repeat=output.numel()):
        y = torch.tensor(bits, dtype=output.dtype)
        found.append((float(torch.where(y > 0, p, 1 - p).prod()), likelihood.gradient(output, y.reshape(output.shape))))
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_gradients_of_the_models_own_labels_have_mean_zero_and_the_hessian_as_covariance(name: str, reduction: str) -> None:
    criterion, output = CRITERIA[name](reduction=reduction), normal(1, 3, seed=8)
    likelihood, target = likelihoods.resolve(criterion), target_for(name, (1, 3))
    root = math.sqrt(likelihood._per_output(output)) if isinstance(likelihood, Bernoulli) else 1.0
    labelled = [(p, g.flatten() / root) for p, g in drawn_labels(likelihood, output, target)]
    close(sum(p * g for p, g in labelled), torch.zeros(3, dtype=torch.float64))
    close(sum(p * torch.outer(g, g) for p, g in labelled), hessian(criterion, output, target))
    seen = {tuple(g.tolist()) for _, g in labelled}
    for seed in range(40):  # and what `sample` gives is one of these
        one = likelihood.sample(output, target, torch.Generator().manual_seed(seed)).flatten()
        assert any(torch.allclose(one, torch.tensor(g, dtype=one.dtype), rtol=0, atol=1e-12) for g in seen)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_normal_draw_is_a_linear_map_of_standard_normal_numbers_with_the_hessian_as_covariance(reduction: str) -> None:
    criterion, output, target = nn.MSELoss(reduction=reduction), normal(2, 3), normal(2, 3, seed=4)
    likelihood = Normal(reduction)
    got = likelihood.sample(output, target, torch.Generator().manual_seed(5))
    noise = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    factor = (got / noise).flatten()
    close(factor.square().diag() * likelihood.scale(output, target), hessian(criterion, output, target))
    assert not torch.equal(got, likelihood.sample(output, target, torch.Generator().manual_seed(6)))


@each_case
def test_a_sample_is_one_of_the_generator_and_ignores_what_is_ignored(criterion: nn.Module, output: Tensor, target: Tensor) -> None:
    likelihood = likelihoods.resolve(criterion)
    first, again = (likelihood.sample(output, target, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == output.shape
    rows = dense_terms.rows(criterion, first)
    if isinstance(criterion, nn.CrossEntropyLoss):
        kept = (target != criterion.ignore_index).flatten()
        assert (rows[~kept] == 0).all() and (rows[kept] != 0).all()


def test_frequencies_of_drawn_labels_follow_the_model() -> None:
    """The one test of frequencies: 4000 draws, a standard error below 0.008 each, and a fixed seed."""
    logits = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    drawn = Categorical().sample(logits.expand(4000, 3), torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0))
    torch.testing.assert_close((drawn < 0).double().mean(0), logits.softmax(0), rtol=0, atol=0.03)


def test_half_precision_and_extreme_logits() -> None:
    output, target = torch.tensor([[60.0, -60.0, 0.0]], dtype=torch.float16), torch.tensor([1])
    for found in (Categorical().gradient(output, target), *Categorical().factor(output, target)):
        assert found.dtype == torch.float32 and found.isfinite().all()
    far = torch.tensor([[800.0, -800.0]], dtype=torch.float64)
    assert torch.stack(list(Bernoulli().factor(far, torch.zeros_like(far)))).isfinite().all()
    assert torch.stack(list(Categorical().factor(far, torch.tensor([0])))).isfinite().all()


def test_other_criteria_and_reductions_are_refused() -> None:
    with pytest.raises(ObservationError, match="reduction='average' is not modelled by the 'normal' likelihood"):
        Normal("average")
    with pytest.raises(ObservationError, match=r"a HuberLoss.*nn\.CrossEntropyLoss, nn\.MSELoss, nn\.BCEWithLogitsLoss"):
        likelihoods.resolve(nn.HuberLoss())
    with pytest.raises(UnknownName, match=r"'categorial'.*did you mean 'categorical'"):
        likelihoods.resolve("categorial")


def test_terms_that_cannot_be_told_apart_by_example_are_refused() -> None:
    with pytest.raises(ObservationError, match="3 terms for a batch of 2 examples"):
        exact_columns(Categorical(), normal(3, 4), labels(4, 3), 2)
