"""Block-diagonal by layer, each block by the Gram matrix of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from precond.observe import Kind
from precond.representations.base import REGISTRY, Representation
from precond.representations.gram import FlatGram
from precond.representations.layer_low_rank import LayerLowRank


@REGISTRY.register("layer_gram")
@dataclass(frozen=True, kw_only=True)
class LayerGram(FlatGram):
    """C_l = U_l^T U_l for each layer, in parameter order (weight, then bias), with its own Gram matrix K_l; otherwise as `full_gram`.

    Memory n^2 a layer beside what the step holds; cost n^2 (in + out) and two products with U_l, n in out each. A gradient a step is held
    as by `layer_low_rank`. Sources: Ren & Goldfarb 2019; Yang et al. (SENG) 2022.

    >>> LayerGram().scope
    'layer'
    """

    scope = "layer"
    requests = ("columns", "gradient")

    def over(self, kind: Kind) -> Representation:
        return LayerLowRank() if kind == "gradient" else self
