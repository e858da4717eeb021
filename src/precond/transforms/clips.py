"""Trust regions: directions that are scaled down or clamped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.transforms.base import Scene, State, Transform, Vectors

_TINY = 1e-30


@dataclass(frozen=True)
class Clip(Transform):
    """A bound."""

    bound: float = 1.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"{type(self).__name__}(bound={self.bound}): a bound is positive.")


@dataclass(frozen=True)
class KLClip(Clip):
    """Scale all directions by min(1, sqrt(bound / (lr^2 sum <d, g>))): a trust region in the Kullback-Leibler divergence.

    Uses d^T g = d^T C d for d = C^-1 g, g what was preconditioned. Source: Ba, Grosse & Martens 2017.
    """

    bound: float = 1e-3

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        if not scene.started or not directions:
            return directions
        total = _sum(scene.rates[name] ** 2 * _inner(d, gradients[name]) for name, d in directions.items())
        return _scaled(directions, (self.bound / total.clamp(min=_TINY)).sqrt().clamp(max=1.0))


@dataclass(frozen=True)
class NormClip(Clip):
    """Scale all directions so that their norm together is at most `bound`."""

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        if not directions:
            return directions
        norm = _sum(_inner(d, d) for d in directions.values()).sqrt()
        return _scaled(directions, (self.bound / norm.clamp(min=_TINY)).clamp(max=1.0))


@dataclass(frozen=True)
class RMSClip(Clip):
    """Scale each block's direction so that the root of the mean of its squares is at most `bound`.

    As PSGD does with 1.1 for whitened gradients, whose entries are about 1 (Li, 2018, arXiv 1512.04202; released code).
    """

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        return {name: d * self._factor(d).to(d.dtype) for name, d in directions.items()}

    def _factor(self, d: Tensor) -> Tensor:
        return (self.bound / (_inner(d, d) / d.numel()).sqrt().clamp(min=_TINY)).clamp(max=1.0)


@dataclass(frozen=True)
class ElementClip(Clip):
    """Clamp every entry of the direction to [-bound, bound]."""

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        return {name: d.clamp(-self.bound, self.bound) for name, d in directions.items()}


def _inner(u: Tensor, v: Tensor) -> Tensor:
    """<u, v> in float64, where float32 would overflow."""
    a, b = (x.abs().amax().clamp(min=_TINY) for x in (u, v))
    return torch.dot(u / a, v / b).to(torch.float64) * a.to(torch.float64) * b.to(torch.float64)


def _sum(values: Iterable[Tensor]) -> Tensor:
    """A block that is not finite counts as 0: it will not move."""
    return torch.stack([torch.where(v.isfinite(), v, torch.zeros_like(v)) for v in values]).sum()


def _scaled(directions: Vectors, factor: Tensor) -> Vectors:
    return {name: d * factor.to(d.dtype) for name, d in directions.items()}
