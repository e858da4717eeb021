"""Transforms: what is applied around the preconditioner, in order; each sees gradients, directions and learning rates by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Vectors = dict[str, Tensor]
State = dict[str, Any]


@dataclass(frozen=True)
class Transform:
    """`before` changes the vector that is preconditioned, `after` the direction. State: tensors and numbers by block."""

    def before(self, vectors: Vectors, state: State) -> Vectors:
        return vectors

    def after(self, gradients: Vectors, directions: Vectors, rates: Mapping[str, float], state: State, started: bool) -> Vectors:
        """`started` is False before the preconditioner's first step, where the direction is the gradient itself."""
        return directions


@dataclass(frozen=True)
class Momentum(Transform):
    """Exponential average of the gradient before it is preconditioned: m <- beta m + (1 - beta) g, bias-corrected.

    >>> Momentum(0.9).debias
    True
    """

    beta: float = 0.9
    debias: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"Momentum(beta={self.beta}): beta is the weight of the old value, in [0, 1).")

    def before(self, vectors: Vectors, state: State) -> Vectors:
        out = {}
        for name, vector in vectors.items():
            own = state.setdefault(name, {"average": torch.zeros_like(vector), "steps": 0})
            finite = torch.isfinite(vector).all()  # a gradient that is not finite must not stay in the average
            own["average"] = torch.where(finite, self.beta * own["average"] + (1 - self.beta) * vector, own["average"])
            own["steps"] += 1
            averaged = own["average"] / (1 - self.beta ** own["steps"]) if self.debias else own["average"]
            out[name] = torch.where(finite, averaged, vector)
        return out


@dataclass(frozen=True)
class KLClip(Transform):
    """Scale all directions by min(1, sqrt(bound / (lr^2 sum <d, g>))): a trust region in the Kullback-Leibler divergence.

    Uses d^T g = d^T C d for d = C^-1 g. Source: Ba, Grosse & Martens 2017.
    """

    bound: float = 1e-3

    def after(self, gradients: Vectors, directions: Vectors, rates: Mapping[str, float], state: State, started: bool) -> Vectors:
        if not started or not directions:
            return directions
        products = [rates[name] ** 2 * torch.dot(d, gradients[name]).to(torch.float64) for name, d in directions.items()]
        total = torch.stack([torch.where(torch.isfinite(p), p, torch.zeros_like(p)) for p in products]).sum()
        factor = (self.bound / total.clamp(min=1e-30)).sqrt().clamp(max=1.0)
        return {name: d * factor.to(d.dtype) for name, d in directions.items()}


@dataclass(frozen=True)
class NormClip(Transform):
    """Scale all directions so that their norm together is at most `bound`."""

    bound: float = 1.0

    def after(self, gradients: Vectors, directions: Vectors, rates: Mapping[str, float], state: State, started: bool) -> Vectors:
        if not directions:
            return directions
        norm = torch.stack([d.norm().to(torch.float64) for d in directions.values()]).nan_to_num(0.0, 0.0, 0.0).norm()
        factor = (self.bound / norm.clamp(min=1e-30)).clamp(max=1.0)
        return {name: d * factor.to(d.dtype) for name, d in directions.items()}


@dataclass(frozen=True)
class ElementClip(Transform):
    """Clamp every entry of the direction to [-bound, bound]."""

    bound: float = 1.0

    def after(self, gradients: Vectors, directions: Vectors, rates: Mapping[str, float], state: State, started: bool) -> Vectors:
        return {name: d.clamp(-self.bound, self.bound) for name, d in directions.items()}


@dataclass(frozen=True)
class Graft(Transform):
    """Give each block's direction the norm of another method's step: d <- d |d_ref| / |d|; that step itself before the start.

    onto: "sgd" (the gradient), "adagrad", "rmsprop" or "adam" (bias-corrected), whose second moments are of the raw
    gradient, with `eps` outside the root. Source: Agarwal et al., "Learning rate grafting", 2021.

    >>> Graft("adam").beta
    0.999
    """

    onto: Literal["sgd", "adagrad", "rmsprop", "adam"] = "sgd"
    beta: float = 0.999
    eps: float = 1e-8
    _known: tuple[str, ...] = field(default=("sgd", "adagrad", "rmsprop", "adam"), repr=False)

    def __post_init__(self) -> None:
        if self.onto not in self._known:
            raise ValueError(f"Graft(onto={self.onto!r}): choose one of {', '.join(self._known)}.")

    def _reference(self, name: str, gradient: Tensor, state: State) -> Tensor:
        if self.onto == "sgd":
            return gradient
        own = state.setdefault(name, {"second": torch.zeros_like(gradient), "steps": 0})
        square, finite = gradient.square(), torch.isfinite(gradient).all()
        keep, take = (1.0, 1.0) if self.onto == "adagrad" else (self.beta, 1 - self.beta)
        own["second"] = torch.where(finite, keep * own["second"] + take * square, own["second"])
        own["steps"] += 1
        second = own["second"] / (1 - self.beta ** own["steps"]) if self.onto == "adam" else own["second"]
        scaled: Tensor = gradient / (second.sqrt() + self.eps)
        return scaled

    def after(self, gradients: Vectors, directions: Vectors, rates: Mapping[str, float], state: State, started: bool) -> Vectors:
        out = {}
        for name, direction in directions.items():
            reference = self._reference(name, gradients[name], state)
            out[name] = direction * (reference.norm() / (direction.norm() + 1e-16)) if started else reference
        return out
