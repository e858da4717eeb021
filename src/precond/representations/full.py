"""The whole matrix, dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from precond.blocks import Block
from precond.observe import Columns, Kind, Observation
from precond.operators import Dense, Fit, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, dense_matrix
from precond.representations.centring import deviation, first_moment
from precond.representations.fitted import PROBES
from precond.representations.secant import over_pairs
from precond.statistics import Stat


@REGISTRY.register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Representation):
    """Dense (P, P) over all parameters, in parameter order. Memory P^2; for small models and as a reference.

    >>> Full().scope
    'model'
    """

    scope = "model"
    requests = ("columns", "gradient", "product", "factors", "secant", "successive")
    centres = True
    structure = Dense
    followed = PROBES
    fit = "dense"

    def over(self, kind: Kind) -> Representation:
        return over_pairs(self, kind)

    def fits(self, block: Block) -> tuple[Fit, ...]:
        return (Fit((block.n,), ("dense",)),)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {"matrix": Stat("mean", form="matrix")}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        centre = first_moment(observation, block) if isinstance(observation, Columns) else {}
        return {"matrix": dense_matrix(observation, block)} | centre

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        mean = deviation(statistics)
        return Dense(statistics["matrix"] if mean is None else statistics["matrix"] - torch.outer(mean, mean))

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return block.n**2 * itemsize
