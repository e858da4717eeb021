"""Truncated eigendecompositions of matrices C = U^T U held as rows: how many directions are kept, and when."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.numerics import eigh
from precond.operators import LowRank


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How much is kept of C = U^T U, the largest eigenvalues first: the best approximation of its rank (Eckart and Young).

    Args:
        rank: at most so many eigenvalues.
        energy: as few as hold this fraction of the trace.
        tolerance: those above this multiple of the largest. With energy or tolerance the number depends on the data, and reading it
            waits for the device.
        gather: 0: what a history keeps is truncated at each observation. b > 0: rows are appended until there are at least rank + b, and
            are then truncated to the rank before the next are appended (TONGA, Le Roux et al. 2008).

    >>> Truncation(rank=1)(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).abs()
    tensor([[2., 0.]])
    """

    rank: int | None = None
    energy: float | None = None
    tolerance: float = 0.0
    gather: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: keep at least one eigenvalue, or None for all.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy}: it is the fraction of the trace that is kept, in (0, 1].")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}: it is a multiple of the largest eigenvalue, in [0, 1).")
        if self.gather < 0 or (self.gather and self.rank is None):
            raise ValueError(f"gather={self.gather}: it is a number of rows beyond rank=, at least 0.")

    @property
    def cuts(self) -> bool:
        """Whether anything is ever left out."""
        return self.rank is not None or self._by_size

    def __str__(self) -> str:
        said = [] if self.rank is None else [f"rank {self.rank}" + (f" to {self.rank + self.gather}" if self.gather else "")]
        said += [] if self.energy is None else [f"{self.energy:g} of the trace"]
        said += [] if not self.tolerance else [f"values above {self.tolerance:g} of the largest"]
        return ", ".join(said) or "all"

    @property
    def _by_size(self) -> bool:
        return self.energy is not None or self.tolerance > 0

    def __call__(self, rows: Tensor, gram: Tensor | None = None) -> Tensor:
        """Rows (*batch, n, p) -> (*batch, r, p), orthogonal, of the truncated U^T U; as they are where there is nothing to cut.

        gram: U U^T where it is known. Costs n^2 p, 10 n^3 and r n p.
        """
        n, width = rows.shape[-2:]
        if not self.cuts or (not self._by_size and n <= (self.rank or 0)):
            return rows
        values, vectors = eigh(rows @ rows.mT if gram is None else gram)
        chosen, vectors = self.choose(values.flip(-1).clamp(min=0)), vectors.flip(-1)
        most = min(n, width, self.rank or n)
        if self._by_size:
            most = max(1, min(most, int(chosen.sum(-1).max())))
        return (vectors * chosen.unsqueeze(-2))[..., :most].mT @ rows

    def append(self, old: Tensor, new: Tensor) -> Tensor:
        """Rows of U^T U + V^T V, (n, *batch, p) as statistics have them, of which no more are kept than there should be."""
        if self.gather:
            if len(old) >= (self.rank or 0) + self.gather:
                old = self(old.movedim(0, -2)).movedim(-2, 0)
            return torch.cat([old, new])
        return self(torch.cat([old, new]).movedim(0, -2)).movedim(-2, 0)

    def of(self, operator: LowRank) -> LowRank:
        """The truncated operator; itself where rows gather, or nothing is cut."""
        if not self.cuts or self.gather:
            return operator
        if operator.weights is None:
            return LowRank(self(operator.rows, operator.gram))
        eigen = operator.spectral()
        order = eigen.values.abs().argsort(-1, descending=True)
        values = eigen.values.gather(-1, order)
        vectors = eigen.vectors.gather(-1, order.unsqueeze(-2).expand_as(eigen.vectors))
        return LowRank(vectors.mT @ operator.rows, values * self.choose(values.abs()))

    def choose(self, values: Tensor) -> Tensor:
        """Which of the eigenvalues (*batch, n), in descending order, are kept: 1 or 0."""
        kept = torch.ones_like(values)
        if self.rank is not None:
            kept[..., self.rank :] = 0.0
        if self.tolerance:
            kept = kept * (values > self.tolerance * values[..., :1])
        if self.energy is not None and self.energy < 1:
            before = values.cumsum(-1) - values
            kept = kept * (before < self.energy * values.sum(-1, keepdim=True))
        return kept
