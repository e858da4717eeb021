"""Directions in other units."""

from __future__ import annotations

import math
from dataclasses import dataclass

from precond.transforms.base import Scene, State, Transform, Vectors


@dataclass(frozen=True)
class Rescale(Transform):
    """d <- factor d, so that a bound or a learning rate after it is in units of its own.

    Sophia clips m / max(gamma h, eps) at 1: h floored at eps / gamma, factor = 1 / gamma, then `ElementClip(1.0)` (Liu et al. 2024,
    arXiv 2305.14342). Before the preconditioner's first step, nothing.

    >>> Rescale(20.0).after({}, {"w": 0.5}, {}, Scene({}, {}))
    {'w': 10.0}
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"Rescale(factor={self.factor}): it is positive and finite.")

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        return {name: self.factor * d for name, d in directions.items()} if scene.started else directions
