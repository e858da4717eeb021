"""The weights of terms: what arrives at the loss of `reduction="none"` when the user's own mean is differentiated."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.likelihoods.base import Likelihood


class Weighted(Likelihood):
    """A likelihood whose term losses are multiplied by weights w, in units in which sum w^2 = sum w.

    The gradient and the Hessian carry w, columns and samples sqrt(w). The number of terms is sum w = (sum G)^2 / sum G^2 of
    the weights G as given, which is the number of terms kept where G is a mask. `shares`: the weights of the entries of the
    unreduced loss with the weight of the whole call divided out, so that sum shares * losses is what the matrix is of.
    """

    def __init__(self, inner: Likelihood, weights: Tensor, shares: Tensor) -> None:
        super().__init__("mean")
        self.inner, self.weights, self.shares = inner, weights, shares
        self.natural = inner.natural

    @property
    def name(self) -> str:  # type: ignore[override]  # a wrapper has the name of what it wraps
        return self.inner.name

    def event(self, output: Tensor) -> tuple[int, ...]:
        return self.inner.event(output)

    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        counted = self.inner.terms(output, target) * self.weights
        dims = self.event(output)
        return counted.mean(dims, keepdim=True) if dims else counted

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return _nonzero(super().total(output, target))

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return _times(self.inner.gradient(output, target), self.weights)

    def factor(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        root = self.weights.sqrt()
        for column in self.inner.factor(output, target):
            yield _times(column, root)

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        return _times(self.inner.sample(output, target, generator), self.weights.sqrt())

    def hessian_product(self, output: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        return _times(self.inner.hessian_product(output, target, vector), self.weights)

    def loss(self, criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        losses = self.inner.loss(criterion, output, target)
        return (losses * self.shares.to(losses.dtype)).sum()


def weigh(likelihood: Likelihood, output: Tensor, target: Tensor, gradient: Tensor) -> tuple[Likelihood, Tensor, Tensor]:
    """(likelihood, weight, scale) of a differentiated criterion call, from the gradient G that arrived at its loss.

    A reduced loss: G is the weight of the call. An unreduced one: G holds a number for each of its entries l_t, and the loss
    is sum_t G_t l_t = weight * scale * sum_t w_t l_t. With n_t what term t adds to the divisor of a mean,

        weight = sum n G,   w = G weight / sum n G^2,   scale = 1 / sum n w.

    So `criterion(f, y).mean()` is reduction="mean", a mask that is divided by its sum is `ignore_index`, and a constant
    factor is in the weight alone. What is linear in the term losses is sum G_t C_t / sum n G, and the empirical Fisher is
    sum G_t^2 g_t g_t^T / sum n G^2. Terms that are ignored weigh nothing. Where a term is a mean over K outputs, each output
    has its own weight, in units of 1 / K.
    """
    if likelihood.reduction != "none" and gradient.dim() == 0:
        return likelihood, gradient.to(torch.float64).clone(), likelihood.scale(output, target)
    inner = copy.copy(likelihood)
    inner.reduction = "none"
    entries, counts = inner.spread(output, gradient).to(torch.float64), inner.terms(output, target)
    copies = entries.numel() // max(gradient.numel(), 1)  # 2 where the output holds two numbers for one loss
    weight = (entries * counts).sum() / copies
    weights = entries * (weight / _nonzero((entries.square() * counts).sum() / copies))
    if bool((weights < 0).any()):  # a synchronisation with the device, on steps that observe an unreduced loss
        raise ObservationError(
            "terms of an unreduced loss were weighted with both signs (advantages?), so the curvature at the output is indefinite: weigh terms by "
            "numbers of one sign, or compute the curvature from a loss of its own with `preconditioner.observe`."
        )
    weighted = Weighted(inner, weights, gradient.to(torch.float64) / _nonzero(weight))
    return weighted, weight, weighted.scale(output, target)


def _nonzero(value: Tensor) -> Tensor:
    """1 in place of 0: where nothing counts there is nothing to scale."""
    return torch.where(value == 0, torch.ones_like(value), value)


def _times(values: Tensor, weights: Tensor) -> Tensor:
    return values * weights.to(values.dtype)
