"""Block-diagonal by output unit, each block by the Gram matrix of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.blocks import Block
from precond.layers import Ragged, Rule
from precond.observe import Kind, Part
from precond.operators.gram import Layer as Factors
from precond.representations.base import REGISTRY, Representation, zeros
from precond.representations.factored_rows import Pair, outermost
from precond.representations.gram import GramForm
from precond.representations.inputs import input_rows
from precond.representations.unit_low_rank import UnitLowRank, small_units


@REGISTRY.register("unit_gram")
@dataclass(frozen=True, kw_only=True)
class UnitGram(GramForm):
    """C_o = X_o^T X_o for each output unit o, with its Gram matrix X_o X_o^T, in the coordinates of `unit`; X_o is never formed.

    Without shared positions that is (A A^T) o (g_o g_o^T), so that the inputs serve all units. Memory n^2 a unit, cost n^2 in' and n^2 out.
    Vectors, normalisations and embeddings fall back to `unit`; a gradient a step is held as by `unit_low_rank`. Source: Le Roux, Manzagol &
    Bengio, "Topmoumoute online natural gradient algorithm", 2008.

    >>> UnitGram().scope
    'matrix'
    """

    scope = "matrix"
    requests = ("columns", "gradient")

    def over(self, kind: Kind) -> Representation:
        return UnitLowRank() if kind == "gradient" else self

    def hosts(self, block: Block) -> str | None:
        return small_units(block)

    def fallback(self, block: Block) -> str:
        return "unit"

    def pieces(self, block: Block) -> int:
        return 1

    def factor(self, part: Part, block: Block) -> Sequence[Pair | None]:
        calls = list(block.calls(part))
        if not calls:
            return [None]
        rule = _outer(block)
        if rule is None:
            rows = torch.cat([chunk.movedim(0, 1) for chunk in block.gradients(part)])
            return [(rows.new_ones(len(rows), 1, 1, 1, 1), rows.view(*rows.shape[:2], 1, *block.shape))]
        inputs = [rows.a if isinstance(rows, Ragged) else rows for rows in input_rows(part, block, check=True)]
        a = torch.cat([rows.permute(1, 2, 0, 3).unsqueeze(1) for rows in inputs if isinstance(rows, Tensor)], 2)
        g = torch.cat([layer.rule.outputs(seen).permute(2, 0, 3, 1, 4) for layer, seen in calls], 2)
        return [(g, a) if rule.input_first and not block.transposed else (a, g)]

    def nothing(self, block: Block, columns: int) -> Sequence[Pair]:
        rule, like, (rows, width) = _outer(block), zeros(block, 0), block.shape
        if rule is None:
            return [(like.new_zeros(0, 1, 1, 1, 1), like.new_zeros(0, columns, 1, rows, width))]
        layer = next(iter(block.layers.values()))
        groups = rule.groups(layer.module)
        return [(like.new_zeros(0, 1, 1, groups, width), like.new_zeros(0, columns, 1, groups, rows // groups))]

    def operands(self, pairs: Sequence[Pair], block: Block) -> Sequence[Factors | Tensor]:
        ((a, g),) = pairs
        if _outer(block) is None:
            return [outermost(g).squeeze(1).movedim(1, 0)]
        columns = max(a.shape[1], g.shape[1])
        if a.shape[1] > 1:
            g = g.expand(-1, columns, -1, -1, -1)
        first, second = outermost(a).permute(2, 0, 1, 3), outermost(g).permute(2, 3, 0, 1)  # (G, n or N, R, in'), (G, out, n, R)
        return [(first.unsqueeze(1), second.unsqueeze(-1))]

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return sum(block.shape) * itemsize


def _outer(block: Block) -> Rule | None:
    """The rule by which rows of the block are outer products of one kind, if they are."""
    layers = list(block.layers.values())
    rule, weights = layers[0].rule, {layer.parameters.get("weight") for layer in layers}
    alike = all(layer.rule is rule for layer in layers) and len(weights) == 1 and weights <= set(block.names)
    return rule if alike and rule.linear and not rule.one_hot else None
