"""Claims about `precond.likelihoods.weigh`, in float64 to 1e-10: what a likelihood is after its terms were weighted by the user's own mean.

- For every criterion and layout: weight * scale times the gradient, the product and S S^T is autograd's gradient and Hessian of the
  weighted sum; an elementwise criterion weighs every output, a cross-entropy every term.
- An even weight changes nothing but the weight of the call, and is torch's mean.
- With arbitrary weights G the number of terms is (sum n G)^2 / sum n G^2, and `total` is the sum of `terms`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nets import labels, normal
from precond import likelihoods
from precond.likelihoods import Likelihood, exact_columns, weigh
from training import EXACT

W = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)

CALLS = [
    ("ce", nn.CrossEntropyLoss(reduction="none"), normal(4, 3), labels(3, 4), ()),
    (
        "ce tokens",
        nn.CrossEntropyLoss(weight=W, label_smoothing=0.2, ignore_index=1, reduction="none"),
        normal(2, 3, 4),
        labels(3, 2, 4),
        (),
    ),
    ("ce one", nn.CrossEntropyLoss(reduction="none"), normal(3), torch.tensor(1), ()),
    ("mse", nn.MSELoss(reduction="none"), normal(4, 3), normal(4, 3, seed=2), ()),
    ("mse row", nn.MSELoss(reduction="none"), normal(4), normal(4, seed=2), ()),
    ("bce", nn.BCEWithLogitsLoss(pos_weight=W, reduction="none"), normal(2, 4, 3), labels(2, 2, 4, 3).double(), ()),
    ("nll", nn.GaussianNLLLoss(reduction="none"), normal(4, 3), normal(4, 3, seed=2), (normal(4, seed=3).abs(),)),
]
each_call = pytest.mark.parametrize(("criterion", "output", "target", "more"), [pytest.param(*c, id=name) for name, *c in CALLS])


def user_weights(losses: Tensor) -> Tensor:
    return normal(losses.numel(), seed=7).abs().view(losses.shape)


def weighed(criterion: nn.Module, output: Tensor, target: Tensor, more: tuple[Any, ...]) -> tuple[Likelihood, Tensor]:
    """The likelihood of the call, and what multiplies its sums in the loss."""
    likelihood, seen = likelihoods.resolve(criterion).given(output, *more)
    likelihood, weight, scale = weigh(likelihood, seen, target, user_weights(criterion(output, target, *more)))
    return likelihood, weight * scale


@each_call
def test_gradient_product_and_factor_of_a_weighted_call_are_autograds(
    criterion: nn.Module, output: Tensor, target: Tensor, more: tuple[Any, ...]
) -> None:
    likelihood, unit = weighed(criterion, output, target, more)

    by_hand = user_weights(criterion(output, target, *more))

    def loss(flat: Tensor) -> Tensor:
        return (by_hand * criterion(flat.reshape(output.shape), target, *more)).sum()

    H, g, v = torch.func.hessian(loss)(output.flatten()), torch.func.grad(loss)(output.flatten()), normal(*output.shape, seed=9)
    assert_close((unit * likelihood.gradient(output, target)).flatten(), g, **EXACT)
    assert_close((unit * likelihood.hessian_product(output, target, v)).flatten(), H @ v.flatten(), **EXACT)
    batch = output.shape[0] if output.dim() > 1 or target.dim() else 1
    made = exact_columns(likelihood, output, target, batch).reshape(-1, batch, output.numel() // batch)
    assert_close(torch.block_diag(*(unit * torch.einsum("kni,knj->nij", made, made))), H, **EXACT)


@each_call
def test_an_even_weight_is_the_mean_of_the_criterion(criterion: nn.Module, output: Tensor, target: Tensor, more: tuple[Any, ...]) -> None:
    likelihood, seen = likelihoods.resolve(criterion).given(output, *more)
    for even in (1.0, 0.3):
        made, weight, scale = weigh(likelihood, seen, target, torch.full_like(criterion(output, target, *more), even))
        assert_close(scale, likelihood.scale(seen, target), **EXACT)
        assert_close(made.gradient(seen, target), likelihood.gradient(seen, target), **EXACT)
        per_term = output.shape[-1] if likelihood.event(output) == (output.dim() - 1,) and target.shape == output.shape else 1
        assert_close(weight * scale, torch.tensor(even * per_term, dtype=torch.float64), **EXACT)


def test_the_number_of_terms_is_that_of_the_weights_and_of_the_kept_where_they_mask() -> None:
    f, y, G = normal(5, 3), labels(3, 5), torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    for weights, want in ((G, float(G.sum() ** 2 / G.square().sum())), ((G > 0).double() * 7, 3.0)):
        likelihood, weight, scale = weigh(likelihoods.Categorical("none"), f, y, weights)
        assert_close(likelihood.total(f, y), torch.tensor(want, dtype=torch.float64), **EXACT)
        assert_close(likelihood.terms(f, y).sum(), likelihood.total(f, y), **EXACT)
        assert_close((weight, scale), (weights.sum(), 1 / likelihood.total(f, y)), **EXACT)
