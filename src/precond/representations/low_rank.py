"""What the low-rank representations share: C = U^T U of a block, held as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Gradient, Kind, Observation
from precond.operators import Fit, LowRank, Operator
from precond.representations.base import Representation, Statistics, mean_gradient, refuse_kind, weighted_gradients, zeros
from precond.representations.centring import deviation, first_moment
from precond.representations.fitted import PROBES
from precond.representations.leading import Leading
from precond.representations.memory_secant import over_memory
from precond.representations.sketched import Sketched
from precond.statistics import GRAM, Stat
from precond.truncation import Truncation

Method = Literal["rows", "sketch", "lanczos"]

_RANK = 10  # of what is fitted to pairs, where none is given: that of the published code


@dataclass(frozen=True, kw_only=True)
class LowRankForm(Representation):
    """C = U^T U with one row an example and column, or one an observation where C is the square of a gradient.

    rank, energy, tolerance, gather: what of it is kept, see `precond.truncation.Truncation`; all of it by default. Memory n P, and n P
    again where an average over steps truncates, whose error is what each truncation left out, with the weight of its step since; a
    window keeps all its rows and their Gram matrix, of which only the products of the new rows are computed.
    """

    structure = LowRank
    centres = True

    rank: int | None = None
    energy: float | None = None
    tolerance: float = 0.0
    gather: int = 0

    def __post_init__(self) -> None:
        self.truncation  # noqa: B018  # refuses what has no meaning

    @property
    def truncation(self) -> Truncation:
        """What is kept."""
        return Truncation(rank=self.rank, energy=self.energy, tolerance=self.tolerance, gather=self.gather)

    @property
    def rows(self) -> Stat:
        return Stat("rows", gram=True, truncation=self.truncation)

    def remark(self, shape: tuple[int, ...]) -> str | None:
        return f"cut to {self.truncation}" if self.truncation.cuts else None

    def shape(self, block: Block) -> tuple[int, ...]:
        """(*batch, p) of one row."""
        return (block.n,)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {"rows": self.rows}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if isinstance(observation, Gradient):
            return {"rows": mean_gradient(observation, block).view(1, *self.shape(block))}
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        found = list(weighted_gradients(observation, block)) or [zeros(block, 1, block.n)]
        rows = found[0] if len(found) == 1 else torch.cat(found)
        return {"rows": rows.view(-1, *self.shape(block))} | first_moment(observation, block)

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        rows: Tensor = statistics["rows"].movedim(0, -2)
        mean, weights = deviation(statistics), None
        if mean is not None:
            rows = torch.cat([rows, mean.view(*rows.shape[:-2], 1, -1)], dim=-2)
            weights = rows.new_ones(rows.shape[:-1])
            weights[..., -1] = -1.0
        return self.truncation.of(LowRank(rows, weights, self._gram(rows, statistics)))

    def _gram(self, rows: Tensor, statistics: Statistics) -> Tensor | None:
        """U U^T where it is known."""
        kept: Tensor | None = statistics.get("rows" + GRAM)
        return kept if kept is not None and kept.shape[-1] == rows.shape[-2] else None

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return (self.rank or 1) * block.n * itemsize


@dataclass(frozen=True, kw_only=True)
class Rows(LowRankForm):
    """What `full_low_rank` and `layer_low_rank` share.

    method: what is kept of C.

    - "rows": the rows themselves, cut to rank, energy or tolerance.
    - "sketch": C on rank + oversample random directions, from which C is rebuilt (Nystrom): exact where its rank is no larger. It is linear
      in C, so that every history averages it without loss, and holds (rank + oversample) P for any number of examples; see `Sketched`.
    - "lanczos": the eigenpairs that are largest in absolute value, from products with C alone; see `Leading`.
    - None: rows where the matrix has them, "lanczos" otherwise, as for a Hessian.

    products: of "lanczos", how many there are at most, each about 1.6 training steps; 2 rank + 20 by default, and P, which is exact, where
    there is no rank. Where they do not suffice the eigenvalues found lie inside the true ones.
    oversample: of "sketch", how many directions beyond the rank. seed: keys the directions, or the start of the Lanczos process.
    memory, scaling: of secant pairs, how many are kept, and what the matrix is without them: y^T y / s^T y times I of the newest pair
    that counted, or "none", the identity.
    """

    followed = PROBES
    fit = "low_rank"

    memory: int = 10
    scaling: Literal["newest", "none"] = "newest"
    method: Method | None = None
    oversample: int = 10
    products: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"memory={self.memory}: keep at least one pair.")
        if self.scaling not in ("newest", "none"):
            raise ValueError(f"scaling={self.scaling!r}: choose 'newest' or 'none'.")
        if self.method not in (None, *get_args(Method)):
            raise ValueError(f"method={self.method!r}: choose 'rows', 'sketch' or 'lanczos', or None for what the matrix allows.")
        if self.oversample < 0:
            raise ValueError(f"oversample={self.oversample}: it is a number of directions beyond rank=, at least 0.")
        if self.products is not None and self.products < (self.rank or 1):
            raise ValueError(f"products={self.products}: take at least one for each of the {self.rank or 1} eigenpairs of rank=.")
        if self.method == "sketch" and (self.rank is None or self.gather):
            raise ValueError("method='sketch' needs rank=, the number of eigenvalues it is to find, and gathers no rows: leave gather out.")

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]  # the method decides
        if self.method == "sketch":
            return ("columns", "gradient", "product")
        rows: tuple[Kind, ...] = ("columns", "gradient", "secant", "successive")
        return {"rows": rows, "lanczos": ("product",)}.get(self.method or "", (*rows, "product"))

    def fits(self, block: Block) -> tuple[Fit, ...]:
        return (Fit((block.n,), ("diagonal",), rank=min(self.rank or _RANK, block.n)),)

    def over(self, kind: Kind) -> Representation:
        if self.method == "sketch" and kind in self.requests:
            return Sketched(host=self)
        if kind == "product":
            return Leading(host=self)
        return over_memory(self, kind, self.memory, newest=self.scaling == "newest")
