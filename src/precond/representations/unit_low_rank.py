"""Block-diagonal by output unit, each block by rows."""

from __future__ import annotations

from dataclasses import dataclass

from precond.blocks import Block
from precond.representations.base import REGISTRY
from precond.representations.low_rank import LowRankForm


def small_units(block: Block) -> str | None:
    """Why a dense block a unit is smaller than rows or a Gram matrix, or None."""
    if block.shape[1] <= 2:
        return f"its units have {block.shape[1]} parameters, fewer than a batch has examples, so that a dense block a unit is smaller"
    if any(layer.rule.one_hot for layer in block.layers.values()):
        return "it has a unit for each entry of a vocabulary, most of which no example reads"
    return None


@REGISTRY.register("unit_low_rank")
@dataclass(frozen=True, kw_only=True)
class UnitLowRank(LowRankForm):
    """C_o = X_o^T X_o for each output unit o, X_o the rows of its gradients by example: a stack of matrices, in the coordinates of `unit`.

    Memory n P, Gram matrices n^2 a unit. What is kept of each: rank, energy, tolerance, gather, see `precond.truncation.Truncation`.
    Vectors, normalisations and embeddings fall back to `unit`. Source: Le Roux, Manzagol & Bengio, "Topmoumoute online natural gradient
    algorithm", 2008.

    >>> UnitLowRank(rank=5).scope
    'matrix'
    """

    scope = "matrix"
    requests = ("columns", "gradient")

    def hosts(self, block: Block) -> str | None:
        return small_units(block)

    def fallback(self, block: Block) -> str:
        return "unit"

    def shape(self, block: Block) -> tuple[int, ...]:
        rows, width = block.shape
        return rows, width
