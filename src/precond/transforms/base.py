"""The contract of a transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from precond.tiling import Tiling

Vectors = dict[str, Tensor]
"""Flat vectors by block."""
State = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """What a transform may look at.

    raw: the gradient as the loop left it. rates: the learning rate of each block. started: False before the preconditioner's first
    step, where the direction is the gradient itself. tilings: how the entries of a block are tiles, of the blocks that are tiled. shapes: the
    natural shape of each block: its tensor's, or that of its matrix [W, b].
    """

    raw: Mapping[str, Tensor]
    rates: Mapping[str, float]
    started: bool = True
    tilings: Mapping[str, Tiling] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Transform:
    """`before` changes the vector that is preconditioned, `after` the direction. State: tensors and numbers by block.

    A transform that `searches` decides after the optimizer's update how much of it stays, and needs `optimizer.step(closure)`.
    """

    @property
    def searches(self) -> bool:
        """Whether it evaluates the loss after the update."""
        return False

    def before(self, vectors: Vectors, state: State) -> Vectors:
        """The vectors to precondition, from the gradients or what the transform before made of them."""
        return vectors

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        """The directions; gradients: what was preconditioned."""
        return directions

    def fraction(self, loss: float, slope: float, evaluate: Callable[[float], float]) -> float:
        """How much of the update stays: evaluate(t) is the loss at theta + t d. loss: at theta. slope: g^T d."""
        return 1.0
