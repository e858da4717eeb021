"""Block-diagonal by layer, each block on a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from precond.blocks import Block
from precond.representations.base import REGISTRY
from precond.representations.patterns import Pattern, check
from precond.representations.sparse import SparseForm


@REGISTRY.register("layer_sparse")
@dataclass(frozen=True, kw_only=True)
class LayerSparse(SparseForm):
    """Entries of C_l for each layer, in parameter order (weight, then bias): on a pattern, or as FANG's sparse inverse.

    form, width: see `SparseForm`. pattern: also a mapping from layer names to patterns, as one of your own fits one size only; a layer that
    it does not name falls back to `diagonal`. Memory sum of P_l + m_l numbers. Exactly the blocks of `full_sparse` where a pattern has
    no pair between layers. Source: Grosse & Salakhutdinov (FANG) 2015.

    >>> LayerSparse(pattern={"0": [[], [0], [0]]}).form
    'precision'
    """

    scope = "layer"

    def __post_init__(self) -> None:
        for pattern in self.pattern.values() if isinstance(self.pattern, Mapping) else (self.pattern,):
            check(pattern, self.form, self.width)

    def chosen(self, block: Block | None) -> Pattern:
        if not isinstance(self.pattern, Mapping):
            return self.pattern
        assert block is not None
        return self.pattern[block.name]

    def hosts(self, block: Block) -> str | None:
        if isinstance(self.pattern, Mapping) and block.name not in self.pattern:
            return f"its patterns name the layers {', '.join(map(repr, self.pattern))} only"
        return None
