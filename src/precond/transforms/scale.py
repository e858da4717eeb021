"""Step sizes that depend on the shape of what moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from precond.transforms.base import Scene, State, Transform, Vectors

Rule = Literal["spectral", "rms"]


@dataclass(frozen=True)
class ShapeScale(Transform):
    """d <- factor s d with s of the shape of the block, read as a matrix of r rows (its first dimension) and c columns (all others; 1 of a vector).

    For directions of one size whatever their gradient, such as polar factors, whose singular values are 1. rule="spectral":
    s = sqrt(max(1, r / c)), so that a layer's outputs move alike whatever its width (Jordan et al., "Muon", 2024); "rms":
    s = sqrt(max(r, c)), so that the mean square of the entries of a polar factor is 1 whatever its shape, and factor=0.2 makes it that of
    AdamW's (Liu et al., "Muon is scalable for LLM training", 2025, arXiv 2502.16982). Before the preconditioner's first step, nothing.

    >>> scene = Scene({}, {}, shapes={"w": (8, 2)})
    >>> ShapeScale().after({}, {"w": 1.0}, {}, scene)
    {'w': 2.0}
    """

    rule: Rule = "spectral"
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"ShapeScale(rule={self.rule!r}): choose one of {', '.join(map(repr, get_args(Rule)))}.")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"ShapeScale(factor={self.factor}): it is positive and finite.")

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        return {name: self._size(scene.shapes[name]) * d for name, d in directions.items()} if scene.started else directions

    def _size(self, shape: tuple[int, ...]) -> float:
        rows, columns = shape[0], math.prod(shape[1:])
        return self.factor * math.sqrt(max(1, rows / columns) if self.rule == "spectral" else max(rows, columns))
