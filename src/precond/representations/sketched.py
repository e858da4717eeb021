"""What low-rank representations become with method="sketch": C on a few random directions, which averages as C itself does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from precond.blocks import Block
from precond.numerics import eigh, symmetrise
from precond.observe import Columns, Gradient, Observation, Product
from precond.operators import LowRank, Operator
from precond.randomness import keyed_generator
from precond.representations import hosted
from precond.representations.base import Statistics, mean_gradient, multiplied, refuse_kind, weighted_gradients, zeros
from precond.representations.centring import deviation, first_moment
from precond.representations.hosted import Hosted
from precond.statistics import Stat
from precond.truncation import Truncation


class Host(hosted.Host, Protocol):
    """The options of a low-rank representation."""

    @property
    def rank(self) -> int | None: ...
    @property
    def oversample(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def truncation(self) -> Truncation: ...


@dataclass(frozen=True, kw_only=True)
class Sketched(Hosted):
    """S = W C with k = rank + oversample orthonormal random rows W (k, P), the same at every step; see `Rows.method`.

    What is made of it is C_k = S^T (S W^T)^+ S (Nystrom), cut to the rank. It is C where k is at least the rank of C. For a positive
    semi-definite C, 0 <= C_k <= C, and with C = V D V^T split after r < k values, W V = [W1, W2]: trace(C - C_k) <= trace(D2) +
    |D2^(1/2) W2^T (W1^T)^+|_F^2. An indefinite C, whose small matrix S W^T may be close to singular where C is not, keeps the `rank`
    largest of its eigenvalues alone, for which the oversampling is what bounds them from below.

    Memory k P whatever the number of examples and steps; cost of an observation k (columns) P, or k products; of the operator k^2 P.
    Sources: Halko, Martinsson & Tropp 2011; Tropp, Yurtsever, Udell & Cevher, "Fixed-rank approximation of a positive-semidefinite matrix
    from streaming data", 2017; Park & Nakatsukasa, "Randomized low-rank approximation for symmetric indefinite matrices", 2023.
    """

    requests = ("columns", "gradient", "product")
    structure = LowRank
    centres: ClassVar[bool] = True

    host: Host

    def remark(self, shape: tuple[int, ...]) -> str | None:
        return f"sketch of {self._width} directions, cut to {self.host.truncation}"

    @property
    def _width(self) -> int:
        return (self.host.rank or 0) + self.host.oversample

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {"sketch": Stat("mean")}

    def directions(self, block: Block) -> Tensor:
        """W (k, n), drawn anew where it is needed: it is as large as what is kept."""
        like, n = zeros(block, 0), block.n
        generator = keyed_generator(torch.device("cpu"), "directions", self.host.seed, n)
        drawn = torch.randn(n, min(self._width, n), dtype=torch.float64, generator=generator)
        W: Tensor = torch.linalg.qr(drawn.to(like)).Q.mT
        return W.contiguous()

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        W = self.directions(block)
        if isinstance(observation, Product):
            return {"sketch": multiplied(observation.local, W, block)}
        if isinstance(observation, Gradient):
            gradient = mean_gradient(observation, block)
            return {"sketch": torch.outer(W @ gradient, gradient)}
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        S = torch.zeros_like(W)
        for rows in weighted_gradients(observation, block):
            S.addmm_(W @ rows.mT, rows)
        return {"sketch": S} | first_moment(observation, block)

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        S, W, mean = statistics["sketch"], self.directions(block), deviation(statistics)
        if mean is not None:
            S = S - torch.outer(W @ mean, mean)
        return self.host.truncation.of(_nystrom(S, W, self.host.rank))

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return min(self._width, block.n) * block.n * itemsize


def _nystrom(S: Tensor, W: Tensor, rank: int | None) -> LowRank:
    """S^T (S W^T)^+ S by eigenvalues of the small matrix that are above its rounding; of an indefinite one the largest alone."""
    d, Z = eigh(symmetrise(S @ W.mT))
    noise = len(d) * torch.finfo(d.dtype).eps * S.norm()
    kept = d.abs() > noise
    if rank is not None:
        largest = d.abs().argsort(descending=True).argsort() < rank
        kept = kept & (largest | (d.min() >= -noise))
    root = torch.where(kept, d.abs(), 1.0).rsqrt()
    return LowRank(root.unsqueeze(1) * (Z.mT @ S), d.sign() * kept)
