"""The diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Gradient, Kind, Observation, Product
from precond.operators import Diagonal as DiagonalOperator
from precond.operators import Operator
from precond.representations.base import (
    REGISTRY,
    Representation,
    Statistics,
    mean_gradient,
    product_columns,
    refuse_kind,
    weighted_gradients,
    zeros,
)
from precond.representations.centring import deviation, first_moment
from precond.representations.secant import over_pairs
from precond.representations.unshared import unshared_rows
from precond.statistics import Stat


@REGISTRY.register("diagonal")
@dataclass(frozen=True, kw_only=True)
class Diagonal(Representation):
    """diag(C), exact: (scale) sum_ik u_ik^2, with the square outside the sum over positions.

    Without shared positions it is (g^2)^T a^2 and no gradient by example is formed. From products (Hessian) it takes
    one product a parameter. Memory P. Every parameter tensor is a block of its own.

    >>> Diagonal().scope
    'tensor'
    """

    scope = "tensor"
    requests = ("columns", "gradient", "product", "secant", "successive")
    structure = DiagonalOperator
    centres = True

    def over(self, kind: Kind) -> Representation:
        return over_pairs(self, kind, "entries")

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {"diagonal": Stat("mean", form="diagonal")}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if isinstance(observation, Gradient):
            return {"diagonal": mean_gradient(observation, block).square()}
        if isinstance(observation, Columns):
            return {"diagonal": _from_columns(observation, block)} | first_moment(observation, block)
        if not isinstance(observation, Product):
            raise refuse_kind(self, observation)
        diagonal = zeros(block, block.n)
        for indices, rows in product_columns(observation, block):
            diagonal[indices] = rows[torch.arange(len(indices)), indices]
        return {"diagonal": diagonal}

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        mean = deviation(statistics)
        return DiagonalOperator(statistics["diagonal"] if mean is None else statistics["diagonal"] - mean.square())

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return block.n * itemsize


def _from_columns(observation: Columns, block: Block) -> Tensor:
    unshared = unshared_rows(observation, block) if len(block.parameters[0].shape) > 1 else None
    if unshared is not None:
        return torch.stack([(g.square().T @ a.square()).flatten() for g, a in unshared]).sum(0)
    total = zeros(block, block.n)
    for rows in weighted_gradients(observation, block):
        total = total + rows.square().sum(0)
    return total
