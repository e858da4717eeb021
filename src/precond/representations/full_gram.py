"""The whole matrix, by the Gram matrix of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from precond.observe import Kind
from precond.representations.base import REGISTRY, Representation
from precond.representations.full_low_rank import FullLowRank
from precond.representations.gram import FlatGram


@REGISTRY.register("full_gram")
@dataclass(frozen=True, kw_only=True)
class FullGram(FlatGram):
    """C = U^T U over all parameters, in parameter order, with the Gram matrix K = U U^T of all examples and columns; U is never formed.

    A layer adds (A A^T) o (G G^T) to K, and of products with U only contractions with its inputs and output gradients are computed. What
    has no such factors (biases, normalisations, recurrent layers, depthwise convolutions) is kept as rows, few numbers each. Memory n^2
    beside what the step holds; cost n^2 (sum of widths) and two products, about one gradient each. For one observation or a window
    of them, whose Gram matrix is computed anew at each refresh; a gradient a step has no factors, and is held as by `full_low_rank`.
    Sources: Ren & Goldfarb, "Efficient subsampled Gauss-Newton and natural gradient methods for training neural networks", 2019; Dangel,
    Tatzel & Hennig, "ViViT", 2022.

    >>> FullGram().scope
    'model'
    """

    scope = "model"
    requests = ("columns", "gradient")

    def over(self, kind: Kind) -> Representation:
        return FullLowRank() if kind == "gradient" else self
