"""Grafting: the norm of another method's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.numerics import all_finite
from precond.tiling import Tiling
from precond.transforms.base import Scene, State, Transform, Vectors

Onto = Literal["sgd", "adagrad", "rmsprop", "adam"]
Per = Literal["tile", "block"]
_TINY = 1e-16


@dataclass(frozen=True)
class Graft(Transform):
    """Give each block's direction the norm of another method's step: d <- d |d_ref| / |d|; that step itself before the start.

    onto: "sgd" (the gradient), "adagrad", "rmsprop" or "adam" (bias-corrected). Their second moments are of the raw gradient, their
    numerator is what was preconditioned, so that a `Momentum` before makes "adam" Adam; `eps` is outside the root. per: each tile of a block that
    is held in tiles has a norm of its own, as in Distributed Shampoo, or the block has one. Source: Agarwal et al., "Learning rate grafting",
    2021. Memory: one vector a block, none for "sgd".

    >>> Graft("adam").beta
    0.999
    """

    onto: Onto = "sgd"
    beta: float = 0.999
    eps: float = 1e-8
    per: Per = "tile"

    def __post_init__(self) -> None:
        if self.onto not in get_args(Onto):
            raise ValueError(f"Graft(onto={self.onto!r}): choose one of {', '.join(get_args(Onto))}.")
        if self.per not in get_args(Per):
            raise ValueError(f"Graft(per={self.per!r}): choose one of {', '.join(map(repr, get_args(Per)))}.")
        if not 0 <= self.beta < 1 or self.eps < 0:
            raise ValueError(
                f"Graft(beta={self.beta}, eps={self.eps}): beta is the weight of the old value, in [0, 1), and eps at least 0."
            )

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        out = {}
        for name, direction in directions.items():
            reference = self._reference(scene.raw[name], gradients[name], state, name)
            tiling = scene.tilings.get(name) if self.per == "tile" else None
            out[name] = _with_norm(direction, reference, tiling) if scene.started else reference
        return out

    def _reference(self, raw: Tensor, gradient: Tensor, state: State, name: str) -> Tensor:
        if self.onto == "sgd":
            return gradient
        if name not in state:
            state[name] = {"second": torch.zeros_like(raw), "weight": torch.zeros((), dtype=torch.float64, device=raw.device)}
        own, square = state[name], raw.square()
        keep, take = (1.0, 1.0) if self.onto == "adagrad" else (self.beta, 1 - self.beta)
        second = keep * own["second"] + take * square
        finite = all_finite([second])  # a square may overflow where the gradient does not
        own["second"] = torch.where(finite, second, own["second"])
        own["weight"] = torch.where(finite, keep * own["weight"] + take, own["weight"])
        second = own["second"]
        if self.onto == "adam":
            second = second / torch.where(own["weight"] > 0, own["weight"], 1.0).to(second.dtype)
        nothing = torch.full_like(raw, torch.nan)  # this method could not take the step either
        scaled: Tensor = torch.where(finite, gradient / (second.sqrt() + self.eps), nothing)
        return scaled


def _with_norm(direction: Tensor, reference: Tensor, tiling: Tiling | None) -> Tensor:
    """The direction with the norm of the reference, tile by tile where there are several."""
    if tiling is None or not tiling.cut:
        scaled: Tensor = direction * (reference.norm() / (direction.norm() + _TINY))
        return scaled
    pieces = []
    for d, r in zip(tiling.split(direction), tiling.split(reference), strict=True):
        d, r = d.flatten(1), r.flatten(1)
        pieces.append((d * (r.norm(dim=1) / (d.norm(dim=1) + _TINY)).unsqueeze(1)).flatten())
    return torch.cat(pieces)
