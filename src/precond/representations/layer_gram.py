"""Block-diagonal by layer, each block by the Gram matrix of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from precond.blocks import Block
from precond.observe import Kind
from precond.operators import Gram
from precond.representations.base import REGISTRY, Representation, Statistics
from precond.representations.factored_rows import Pair
from precond.representations.gram import FlatGram
from precond.representations.gram_sketch import CHOSEN, draw, few_positions, on_few_coordinates
from precond.representations.layer_low_rank import LayerLowRank
from precond.statistics import Stat


@REGISTRY.register("layer_gram")
@dataclass(frozen=True, kw_only=True)
class LayerGram(FlatGram):
    """C_l = U_l^T U_l for each layer, in parameter order (weight, then bias), with its own Gram matrix K_l; otherwise as `full_gram`.

    Memory n^2 a layer beside what the step holds; cost n^2 (in + out) and two products with U_l, n in out each. A gradient a step is held
    as by `layer_low_rank`. Sources: Ren & Goldfarb 2019; Yang et al. (SENG) 2022.

    positions: of a layer with weight sharing, how many are kept of each example: those of the largest singular values of its output
    gradients (R, out), by which also `to_dense` is changed. Exact from min(R, out) on. sketch: q, SENG's for large layers. K_l is computed
    from q inputs and q outputs alone, drawn without replacement at each refresh and scaled by in out / q^2, so that its mean over all draws is
    K_l; of a bias q^2 coordinates, of an embedding's g q^2. Products with U are exact, so that only what a solver inverts on the side of the
    rows (`smw`) is an estimate, which may be no descent. seed: keys the draws, with their number and the sizes. Of the two approximations of
    U^T b in the released code of SENG only the exact one is here: the other is not linear in b.

    >>> LayerGram(sketch=256, positions=16).scope
    'layer'
    """

    scope = "layer"
    requests = ("columns", "gradient")

    sketch: int | None = None
    positions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("sketch", self.sketch), ("positions", self.positions)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: keep at least one, or None for all.")

    def over(self, kind: Kind) -> Representation:
        return LayerLowRank(sketch=None if self.sketch is None else self.sketch**2, seed=self.seed) if kind == "gradient" else self

    def remark(self, shape: tuple[int, ...]) -> str | None:
        said = [] if self.positions is None or len(shape) < 2 else [f"at most {self.positions} positions of an example"]
        said += [] if self.sketch is None else [f"Gram matrix estimated from at most {self.sketch} inputs and outputs"]
        return ", ".join(said) or None

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        spec = dict(super().statistics(block))
        if self.sketch is not None:
            spec |= dict.fromkeys(["draws", *(name + CHOSEN for name in spec)], Stat("state"))
        return spec

    def settle(self, piece: int, pairs: Sequence[Pair], block: Block) -> Sequence[Pair]:
        settled = super().settle(piece, pairs, block)
        if self.positions is None or self.one_hot(piece, block) or max(a.shape[2] for a, _ in settled) <= self.positions:
            return settled
        return [few_positions(pair, self.positions) for pair in settled]

    def rebase(self, statistics: Statistics) -> Statistics:
        """New coordinates."""
        return statistics if self.sketch is None or "a0" not in statistics else draw(statistics, self.sketch, self.seed)

    def gram(self, statistics: Statistics, pairs: Sequence[Pair], block: Block) -> Tensor | None:
        if not any(name.endswith(CHOSEN) for name in statistics):
            return None
        chosen = [tuple(statistics.get(f"{side}{i}{CHOSEN}") for side in ("a", "g")) for i in range(len(pairs))]
        return Gram(self.operands([on_few_coordinates(pair, *some) for pair, some in zip(pairs, chosen, strict=True)], block)).gram
