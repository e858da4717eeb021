"""Claims about `nn.GaussianNLLLoss`, whose variance is an argument of the call, in float64 to 1e-10.

- A variance that the model makes gives the Fisher matrix in mean and variance, exact by Gauss-Hermite quadrature over the targets; that is
  not the Hessian, which is indefinite there, and so there is no GGN: refused by name. What is sent back is the gradient at a drawn target.
- An unreduced loss with a mean of the user's own is the mean, there too.
- `precond.curvature` takes (target, var) as a pair, and `observe` does. The forms of a given variance are in `test_likelihoods_options.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
import precond
from nets import normal, seeded
from precond import ObservationError, likelihoods
from training import EXACT, make, net

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


class Heads(nn.Module):
    """A mean and a positive variance."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.mean, self.spread = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.shared(x).tanh()
        return self.mean(h), F.softplus(self.spread(h)) + 0.1


def expected_fisher(model: nn.Module, x: Tensor, scale: float) -> Tensor:
    """By Gauss-Hermite quadrature over every target, with plain autograd: scale * sum over entries of E[g g^T]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    total: Any = 0
    mean, var = model(x)
    for f, v in zip(mean.flatten(), var.flatten(), strict=True):
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            y = (f + v.sqrt() * float(node)).detach()
            loss = 0.5 * (v.log() + (f - y) ** 2 / v)
            g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
            total = total + float(weight) * torch.outer(g, g)
    return scale * total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_variance_made_by_the_model_has_the_fisher_matrix_of_mean_and_variance(reduction: str) -> None:
    model, criterion, x, y = seeded(Heads), nn.GaussianNLLLoss(reduction=reduction), normal(5, 4), normal(5, 2, seed=3)
    preconditioner = make("fisher", loss_weights="given").attach(model, criterion)
    criterion(*(lambda f, v: (f, y, v))(*model(x))).backward()
    preconditioner.step()
    scale = 1 / 10 if reduction == "mean" else 1.0
    torch.testing.assert_close(preconditioner.operators["model"].to_dense(), expected_fisher(seeded(Heads), x, scale), **EXACT)
    flat = seeded(Heads)
    f, v = flat(x)
    loss = criterion(f, y, v)
    g = torch.autograd.grad(loss, list(flat.parameters()), create_graph=True)
    row = torch.cat([t.flatten() for t in torch.autograd.grad(g[0][0, 0], list(flat.parameters()))])
    assert (row - preconditioner.operators["model"].to_dense()[0]).norm() > 1e-3 * row.norm()


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_what_is_sent_back_for_mean_and_variance_is_the_gradient_at_a_drawn_target(shape: tuple[int, ...]) -> None:
    f, var, y = normal(*shape), (normal(*shape, seed=2).abs() + 0.1).requires_grad_(), normal(*shape, seed=3)
    criterion = nn.GaussianNLLLoss()
    likelihood, both = likelihoods.resolve(criterion).given(f, var)
    both = both.detach()

    def gradient(target: Tensor) -> Tensor:
        leaves = f.clone().requires_grad_(), var.detach().clone().requires_grad_()
        return torch.stack(torch.autograd.grad(criterion(leaves[0], target, leaves[1]), leaves), -1)

    def pairs(flat: Tensor) -> Tensor:
        return torch.stack(flat.chunk(2, -1), -1).reshape(*shape, 2)

    scale = likelihood.scale(both, y)
    close(pairs(scale * likelihood.gradient(both, y)), gradient(y))
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = likelihood.sample(both, y, torch.Generator().manual_seed(3)) * (1 / (shape[1] if len(shape) > 1 else 1)) ** 0.5
    close(pairs(scale * drawn), gradient(f - var.detach().sqrt() * noise))


@pytest.mark.parametrize("matrix", ["ggn", "fisher"])
def test_the_hessian_in_the_variance_is_indefinite_and_no_ggn(matrix: str) -> None:
    model, criterion, x, y = seeded(Heads), nn.GaussianNLLLoss(), normal(5, 4), normal(5, 2, seed=3)
    _held = make(matrix).attach(model, criterion)
    mean, var = model(x)
    if matrix == "fisher":
        criterion(mean, y, var=var).backward()
    else:
        with pytest.raises(ObservationError, match="use the matrix 'fisher'"):
            criterion(mean, y, var=var).backward()


@pytest.mark.parametrize("matrix", ["ggn", "fisher", "hessian", "empirical_fisher"])
@pytest.mark.parametrize("repr", ["full", "matrix_free"])
def test_curvature_takes_the_target_and_the_variance_as_a_pair(matrix: str, repr: str) -> None:
    x, y, var, criterion = normal(5, 4), normal(5, 3, seed=3), normal(5, 3, seed=4).abs() + 0.1, nn.GaussianNLLLoss()
    bound: Any = lambda output, target: criterion(output, target, var)  # noqa: E731
    if matrix == "empirical_fisher":
        rows = torch.stack([dense.gradient(net(), lambda f, t, i=i: criterion(f[i], t[i], var[i]), x, y) for i in range(5)])
        want = rows.T @ rows / 5
    else:
        want = getattr(dense, "ggn" if matrix == "fisher" else matrix)(net(), bound, x, y)
    close(precond.curvature(net(), criterion, x, (y, var), matrix=matrix, repr=repr).to_dense(), want)


@pytest.mark.parametrize("matrix", ["fisher", "empirical_fisher", "fisher_mc"])
def test_an_unreduced_loss_in_mean_and_variance_has_the_matrix_of_its_mean(matrix: str) -> None:
    found = []
    for reduction in ("mean", "none"):
        model, criterion, x, y = seeded(Heads), nn.GaussianNLLLoss(reduction=reduction), normal(5, 4), normal(5, 2, seed=3)
        preconditioner = make(matrix).attach(model, criterion)
        mean, var = model(x)
        criterion(mean, y, var).mean().backward()
        preconditioner.step()
        found.append(preconditioner.operators["model"].to_dense())
    close(found[1], found[0])


def test_observe_takes_the_pair_too() -> None:
    found = []
    for observed in (True, False):
        model, x, y, var = net(), normal(5, 4), normal(5, 3, seed=3), normal(5, 3, seed=4).abs() + 0.1
        criterion = nn.GaussianNLLLoss()
        preconditioner = make().attach(model, "gaussian_nll" if observed else criterion)
        f = model(x)
        if observed:
            preconditioner.observe(F.gaussian_nll_loss(f, y, var), f, (y, var)).backward()
        else:
            criterion(f, y, var).backward()
        preconditioner.step()
        found.append(preconditioner.operators["model"].to_dense())
    close(found[0], found[1])
