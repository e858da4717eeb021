"""Block-diagonal by layer, each block by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Kind, keyed_generator
from precond.representations.base import REGISTRY, Statistics
from precond.representations.low_rank import Rows
from precond.statistics import Stat


@REGISTRY.register("layer_low_rank")
@dataclass(frozen=True, kw_only=True)
class LayerLowRank(Rows):
    """C_l = U_l^T U_l for each layer, in parameter order (weight, then bias). Otherwise as `full_low_rank`.

    sketch: q, SENG's. Layers with P_l > q parameters compute their Gram matrix from q coordinates alone, drawn without replacement at each
    refresh and scaled by P_l / q, so that its mean over all draws is the Gram matrix: n^2 q in place of n^2 P_l. Products with U are exact.
    A solver that inverts on the side of the rows (`smw`) then inverts an estimate, which may be no descent; `to_dense` is that of all
    coordinates, `trace` an unbiased estimate. seed: keys the draws, with their number and the size of the layer.

    Memory n P. Source: Yang et al., "Sketch-based empirical natural gradient methods for deep learning" (SENG), 2022.

    >>> LayerLowRank(sketch=256).sketch
    256
    """

    scope = "layer"

    sketch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sketch is not None and self.sketch < 1:
            raise ValueError(f"sketch={self.sketch}: draw at least one coordinate, or None for no sketch.")
        if self.sketch is not None and self.method not in (None, "rows"):
            raise ValueError(f"sketch= estimates the Gram matrix of rows, which method={self.method!r} does not keep: give one of the two.")
        if self.sketch is not None and self.truncation.cuts:
            raise ValueError(
                "sketch= estimates the Gram matrix, whose eigenvectors rank, energy and tolerance would take for exact: give one of the two."
            )

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]  # a Gram matrix is estimated of rows alone
        return tuple(kind for kind in super().requests if self.sketch is None or kind != "product")

    @property
    def rows(self) -> Stat:
        return Stat("rows", gram=self.sketch is None, truncation=self.truncation)

    def remark(self, shape: tuple[int, ...]) -> str | None:
        return super().remark(shape) if self.sketch is None else f"Gram matrix estimated from at most {self.sketch} coordinates"

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        drawn = {} if self.sketch is None else dict.fromkeys(("coordinates", "draws"), Stat("state"))
        return {**super().statistics(block), **drawn}

    def rebase(self, statistics: Statistics) -> Statistics:
        """New coordinates."""
        rows: Tensor | None = statistics.get("rows")
        if self.sketch is None or rows is None or rows.shape[-1] <= self.sketch:
            return statistics
        width = rows.shape[-1]
        draws = int(statistics.get("draws", 0)) + 1
        generator = keyed_generator(torch.device("cpu"), "sketch", self.seed, draws, width)
        coordinates = torch.randperm(width, generator=generator)[: self.sketch].to(rows.device)
        return statistics | {"coordinates": coordinates, "draws": torch.tensor(draws)}

    def _gram(self, rows: Tensor, statistics: Statistics) -> Tensor | None:
        if "coordinates" not in statistics:
            return super()._gram(rows, statistics)
        part = rows[:, statistics["coordinates"]]
        return (part @ part.T) * (rows.shape[-1] / part.shape[-1])
