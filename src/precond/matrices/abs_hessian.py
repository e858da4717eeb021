"""The absolute Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precond.matrices.base import REGISTRY, Matrix
from precond.operators import Absolute, BlockDiagonal, Dense, Diagonal, LowRank, Operator, Pairs, Repeated


@REGISTRY.register("abs_hessian")
@dataclass(frozen=True, kw_only=True)
class AbsHessian(Matrix):
    """Absolute Hessian: V |L| V^T with H = V L V^T, positive semi-definite; its inverse leaves saddle points (saddle-free Newton).

    What is averaged over batches and steps is H, since absolute values do not add; the absolute value is taken of the
    average: exactly on dense blocks, diagonals and low-rank forms, and on products by `steps` of the Lanczos process (exact when the
    Krylov space is exhausted). Cost: as `hessian`; `steps` products for each product. Source: Dauphin et al.,
    "Identifying and attacking the saddle point problem", 2014.

    >>> AbsHessian(steps=10).definite
    True
    """

    supplies = ("product",)
    needs = "the criterion itself, twice differentiable; second-order passes by replay"

    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"AbsHessian(steps={self.steps}): the Lanczos process needs at least one step.")

    @property
    def second_order(self) -> bool:
        return True

    def finish(self, operator: Operator) -> Operator:
        if isinstance(operator, Diagonal):
            return Diagonal(operator.values.abs())
        if isinstance(operator, Dense):
            values, vectors = torch.linalg.eigh(operator.matrix)
            return Dense((vectors * values.abs().unsqueeze(-2)) @ vectors.mT)
        if isinstance(operator, LowRank):
            eigen = operator.spectral()
            return LowRank(eigen.vectors.mT @ operator.rows, eigen.values.abs())
        if isinstance(operator, BlockDiagonal):
            return operator.with_blocks({name: self.finish(block) for name, block in operator.blocks.items()})
        if isinstance(operator, Repeated):
            return operator.with_operator(self.finish(operator.operator))
        if isinstance(operator, Pairs):  # what is fitted to pairs of H is |H|
            return operator
        return Absolute(operator, self.steps)
