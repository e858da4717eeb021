"""Momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.numerics import all_finite
from precond.transforms.base import Scene, State, Transform, Vectors

Place = Literal["before", "after"]
Form = Literal["average", "sum"]


@dataclass(frozen=True)
class Momentum(Transform):
    """A running average or sum of the gradient, before it is preconditioned, or of the direction after it.

    form="average": m <- beta m + (1 - beta) x from 0, divided by 1 - beta^t where `debias`. form="sum": m <- beta m + (1 - dampening) x from
    the first x, as torch.optim.SGD. nesterov: what comes out is one step further, (1 - beta) x + beta m, of a sum x + beta m.
    A vector that is not finite does not enter, and comes out as it is.

    Args:
        beta: the weight of the old value, in [0, 1).
        place: "before" or "after" the preconditioner.

    Memory: one vector a block.

    >>> Momentum(0.9).debias
    True
    """

    beta: float = 0.9
    debias: bool = True
    place: Place = "before"
    form: Form = "average"
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"Momentum(beta={self.beta}): beta is the weight of the old value, in [0, 1).")
        for name, value, known in (("place", self.place, get_args(Place)), ("form", self.form, get_args(Form))):
            if value not in known:
                raise ValueError(f"Momentum({name}={value!r}): choose one of {', '.join(map(repr, known))}.")
        if self.dampening and (self.form == "average" or self.nesterov):
            raise ValueError("Momentum(dampening=...) belongs to form='sum' without nesterov: an average has weights that sum to 1.")

    def before(self, vectors: Vectors, state: State) -> Vectors:
        return self._moved(vectors, state) if self.place == "before" else vectors

    def after(self, gradients: Vectors, directions: Vectors, state: State, scene: Scene) -> Vectors:
        return self._moved(directions, state) if self.place == "after" else directions

    def _moved(self, vectors: Vectors, state: State) -> Vectors:
        return {name: self._one(x, state, name) for name, x in vectors.items()}

    def _one(self, x: Tensor, state: State, name: str) -> Tensor:
        if name not in state:
            state[name] = {"average": torch.zeros_like(x), "weight": torch.zeros((), dtype=torch.float64, device=x.device)}
        own, beta = state[name], self.beta
        finite = all_finite([x.norm()])  # a block whose norm overflows does not move, and would be remembered for long
        first = own["weight"] == 0
        take = 1 - self.dampening * (~first).to(x.dtype) if self.form == "sum" else 1 - beta
        own["average"] = torch.where(finite, beta * own["average"] + take * x, own["average"])
        own["weight"] = torch.where(finite, beta * own["weight"] + (1 - beta), own["weight"])
        if self.form == "sum":
            return torch.where(finite, x + beta * own["average"] if self.nesterov else own["average"], x)
        out, weight = own["average"], own["weight"]
        if self.nesterov:
            out, weight = beta * out + (1 - beta) * x, beta * weight + (1 - beta)
        if self.debias:
            out = out / torch.where(finite, weight, 1.0).to(x.dtype)
        return torch.where(finite, out, x)
