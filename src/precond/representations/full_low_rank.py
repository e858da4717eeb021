"""The whole matrix, by rows."""

from __future__ import annotations

from dataclasses import dataclass

from precond.representations.base import REGISTRY
from precond.representations.low_rank import Rows


@REGISTRY.register("full_low_rank")
@dataclass(frozen=True, kw_only=True)
class FullLowRank(Rows):
    """C = U^T U over all parameters, in parameter order: a row for each example and column, or for each step's gradient.

    With `history=Window(m)` and a gradient a step it is the window of M-FAC and GGT; with `Ema` and a rank the truncated eigenbasis of
    TONGA; over secant pairs, L-BFGS with the last `memory` pairs. Memory n P, cost of the Gram matrix n^2 P. What is kept: rank, energy,
    tolerance, gather, see `precond.truncation.Truncation`; everything by default, which is exact. Under an average over steps each
    truncation is the best of its rank, and the result is below the exact average. Of a matrix that has products alone, as a Hessian, it is
    the eigenpairs that are largest in absolute value; of any, a sketch: method, products, oversample, seed, see `Rows`. Sources: Le Roux,
    Manzagol & Bengio, "Topmoumoute online natural gradient algorithm", 2008; Agarwal et al. (GGT) 2019; Frantar, Kurtic & Alistarh (M-FAC)
    2021; Liu & Nocedal, "On the limited memory BFGS method", 1989.

    >>> FullLowRank(rank=5).truncation.cuts
    True
    """

    scope = "model"
