"""What low-rank representations become of a matrix that has products alone: its eigenpairs that are largest in absolute value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from precond.blocks import Block
from precond.lanczos import eigenpairs
from precond.numerics import eigh
from precond.observe import Observation, Product
from precond.operators import LowRank, Operator
from precond.randomness import keyed_generator
from precond.representations import hosted
from precond.representations.base import Statistics, multiplied, refuse_kind, zeros
from precond.representations.hosted import Hosted
from precond.statistics import Stat
from precond.truncation import Truncation


class Host(hosted.Host, Protocol):
    """The options of a low-rank representation."""

    @property
    def rank(self) -> int | None: ...
    @property
    def products(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def truncation(self) -> Truncation: ...


@dataclass(frozen=True, kw_only=True)
class Leading(Hosted):
    """C ~ V D V^T by the Lanczos process, kept as C+ - C- with C+ = U+^T U+ and C- = U-^T U-; see `Rows.method`.

    Each of the two is averaged as other rows are, and truncated for itself; their difference is truncated again. With as many products as
    parameters all of C is taken, a number of unit vectors at a time, and its eigendecomposition is exact. Memory 2 r P.
    """

    requests = ("product",)
    structure = LowRank

    host: Host

    @property
    def rows(self) -> Stat:
        return Stat("rows", truncation=self.host.truncation, whole=True)

    def centring(self) -> Mapping[str, Stat]:
        return {}

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return dict.fromkeys(("positive", "negative"), self.rows)

    def remark(self, shape: tuple[int, ...]) -> str | None:
        found = "" if self._most is None else f"eigenpairs from at most {self._most} products, "
        return f"{found}cut to {self.host.truncation}" if self.host.truncation.cuts else found.removesuffix(", ") or None

    @property
    def _most(self) -> int | None:
        """Of products; None: as many as there are parameters."""
        if self.host.products is not None:
            return self.host.products
        return None if self.host.rank is None else 2 * self.host.rank + 20

    def _number(self, block: Block) -> int:
        """Of eigenpairs kept, which no data decides."""
        return min(n for n in (block.n, self._most, self.host.rank) if n is not None)

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, Product):
            raise refuse_kind(self, observation)
        values, vectors = self._eigenpairs(observation, block)
        order = values.abs().argsort(descending=True)[: self._number(block)]
        values, vectors = values[order], vectors[:, order].mT
        values = values * self.host.truncation.choose(values.abs())
        rows = zeros(block, 2, self._number(block), block.n)
        for sign, made in zip((1.0, -1.0), rows, strict=True):
            made[: len(values)] = (sign * values).clamp(min=0).sqrt().unsqueeze(1) * vectors
        return {"positive": rows[0], "negative": rows[1]}

    def _eigenpairs(self, observation: Product, block: Block) -> tuple[Tensor, Tensor]:
        like = zeros(block, 0)
        if self._most is None or self._most >= block.n:
            whole = multiplied(observation, torch.eye(block.n, dtype=like.dtype, device=like.device), block)
            return eigh(whole) if bool(whole.isfinite().all()) else (whole[0] * torch.nan, whole)
        generator = keyed_generator(torch.device("cpu"), "lanczos", self.host.seed, block.n)
        return eigenpairs(
            lambda v: multiplied(observation, v.unsqueeze(0), block).squeeze(0),
            lambda: torch.randn(block.n, dtype=torch.float64, generator=generator).to(like),
            self._most,
        )

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        positive, negative = statistics["positive"], statistics["negative"]
        signs = torch.cat([torch.ones_like(positive[:, 0]), -torch.ones_like(negative[:, 0])])
        return self.host.truncation.of(LowRank(torch.cat([positive, negative]), signs))

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return 2 * self._number(block) * block.n * itemsize
