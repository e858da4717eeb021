"""A matrix whose inverse has a sparse Cholesky factor, given by small blocks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.operators.base import Operator

NONE = -1
NOISE = 100.0
"""A sum that cancels exactly may leave this multiple of the rounding unit of what it is compared with."""


class SparsePrecision(Operator):
    """The C with C^-1 = (I - B)^T D^-1 (I - B) that has the regressions of F on the parents of a directed acyclic graph.

    A Gaussian network: coordinate i is regressed on its parents, B_i,pa = F_i,pa F_pa,pa^-1 and D_i = F_ii - B_i,pa F_pa,i. It is the
    closest one to N(0, F) of that graph, so C = F with all earlier coordinates as parents, or where F^-1 has the sparsity of the graph;
    without parents it is the diagonal of F. Entries of C on {i} + pa(i) are those of F where any two parents of a coordinate are connected
    themselves, one the parent of the other, as in all presets of the sparse representations; two parents that are not connected are as
    independent in C as the graph makes them, whatever F says.

    Args:
        blocks: (n, k + 1, k + 1), F on (i, pa(i)), i first. Entries of absent parents are not read.
        parents: (n, k) int64, absent ones -1, in any order of coordinates as long as there is no cycle.

    `plus(lam)` is the network of F + lam I, which is what damping means for it; that is not C + lam I. Costs: factors n k^3, once;
    `inverse_matmul` 2 n k a column; `@`, which solves with I - B, as much in as many sequential steps as the longest chain of parents.
    Source: FANG, Grosse and Salakhutdinov 2015.

    >>> F = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> blocks = torch.stack([F, F.flip(0, 1)])
    >>> SparsePrecision(blocks, torch.tensor([[-1], [0]])).to_dense()
    tensor([[2., 1.],
            [1., 2.]])
    """

    def __init__(self, blocks: Tensor, parents: Tensor) -> None:
        n, k = parents.shape if parents.dim() == 2 else (-1, -1)
        if blocks.shape != (n, k + 1, k + 1):
            raise ValueError(
                f"SparsePrecision takes parents (n, k) and blocks (n, k + 1, k + 1), not {tuple(parents.shape)} and {tuple(blocks.shape)}."
            )
        self.blocks, self.parents = blocks, parents

    @property
    def n(self) -> int:
        return self.parents.shape[0]

    @property
    def _like(self) -> Tensor:
        return self.blocks

    def fields(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "parents": self.parents}

    def plus(self, shift: Tensor | float) -> SparsePrecision:
        """The network of F + shift I."""
        shifted = self.blocks.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        return SparsePrecision(shifted, self.parents)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(B (n, k), zero for absent parents, D (n,)).

        Where a block of parents is singular, B_i,pa = F_i,pa F_pa,pa^+; a parent that is within rounding of constant counts as absent.
        """
        variances = self.blocks.diagonal(dim1=-2, dim2=-1)
        there = (self.parents != NONE) & (variances[:, 1:] > self._floor)
        cross = self.blocks[:, 0, 1:] * there
        inside = self.blocks[:, 1:, 1:] * (there.unsqueeze(1) & there.unsqueeze(2)) + torch.diag_embed((~there).to(self.dtype))
        L, info = torch.linalg.cholesky_ex(inside)
        B = torch.cholesky_solve(cross.unsqueeze(2), L).squeeze(2)
        singular = (info != 0) & inside.isfinite().all(-1).all(-1)
        if bool(singular.any()):
            B[singular] = (torch.linalg.pinv(inside[singular], hermitian=True) @ cross[singular].unsqueeze(2)).squeeze(2)
        return B, self.blocks[:, 0, 0] - (B * cross).sum(1)

    @property
    def _floor(self) -> Tensor:
        """What a variance is that rounding makes of zero: the square of its noise, against the largest."""
        own = self.blocks[:, 0, 0]
        return (NOISE * torch.finfo(self.dtype).eps) ** 2 * own.abs().amax()

    def materialise(self) -> MadePrecision:
        """The same with what a product needs at hand, so that none waits for the device."""
        generations = {str(level): some for level, some in enumerate(self.generations)}
        return MadePrecision(self.blocks, self.parents, *self.factors, generations)

    def inverse_matmul(self, V: Tensor) -> Tensor:
        """C^-1 V for columns V (n, k): two sparse products."""
        return self._residual_transposed(self._residual(V) / self.factors[1].unsqueeze(1))

    def inverse_root(self, power: float) -> Callable[[Tensor], Tensor]:
        if power != 1:
            return super().inverse_root(power)
        return lambda Z: self._residual_transposed(self.factors[1].rsqrt().unsqueeze(1) * Z)

    @property
    def _safe(self) -> Tensor:
        """Parents to index with; the coefficient of an absent one is zero."""
        return self.parents.clamp(min=0)

    def _residual(self, V: Tensor) -> Tensor:
        """(I - B) V."""
        return V - (self.factors[0].unsqueeze(2) * V[self._safe]).sum(1)

    def _residual_transposed(self, V: Tensor) -> Tensor:
        """(I - B)^T V."""
        weighted = self.factors[0].unsqueeze(2) * V.unsqueeze(1)
        return V.index_add(0, self._safe.reshape(-1), weighted.flatten(0, 1), alpha=-1)

    @cached_property
    def generations(self) -> tuple[Tensor, ...]:
        """Coordinates by the length of the longest chain of parents above them; raises `ValueError` where there is a cycle."""
        depth = torch.zeros(self.n, dtype=torch.long, device=self.device)
        for _ in range(self.n + 1):
            above = torch.where(self.parents == NONE, -1, depth[self._safe])
            new = above.amax(1) + 1 if self.parents.shape[1] else depth
            if torch.equal(new, depth):
                return tuple((depth == level).nonzero().squeeze(1) for level in range(int(depth.max()) + 1))
            depth = new
        raise ValueError("the parents of a SparsePrecision form a cycle: leave out one of its edges.")

    def _unroll(self, V: Tensor) -> Tensor:
        """(I - B)^-1 V."""
        result, B = V.clone(), self.factors[0]
        for some in self.generations[1:]:
            result[some] += (B[some].unsqueeze(2) * result[self._safe[some]]).sum(1)
        return result

    def _matmul(self, V: Tensor) -> Tensor:
        B, D = self.factors
        back = V.clone()  # (I - B)^-T V
        for some in reversed(self.generations[1:]):
            sent = B[some].unsqueeze(2) * back[some].unsqueeze(1)
            back.index_add_(0, self._safe[some].reshape(-1), sent.flatten(0, 1))
        return self._unroll(D.unsqueeze(1) * back)

    def logdet(self) -> Tensor:
        return self.factors[1].log().sum()

    def _colour(self, Z: Tensor) -> Tensor:
        return self._unroll(self.factors[1].sqrt().unsqueeze(1) * Z)


class MadePrecision(SparsePrecision):
    """A `SparsePrecision` whose factors and generations are kept, packed and cast with it.

    Args:
        blocks, parents: see there. coefficients, variances: its `factors`. generations: by level, as "0", "1", ...

    >>> F = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> made = SparsePrecision(torch.stack([F, F.flip(0, 1)]), torch.tensor([[-1], [0]])).materialise()
    >>> made.to_dense()
    tensor([[2., 1.],
            [1., 2.]])
    """

    def __init__(self, blocks: Tensor, parents: Tensor, coefficients: Tensor, variances: Tensor, generations: Mapping[str, Tensor]) -> None:
        super().__init__(blocks, parents)
        self.factors = (coefficients, variances)
        self.generations = tuple(generations.values())

    def fields(self) -> dict[str, Any]:
        made = {"coefficients": self.factors[0], "variances": self.factors[1]}
        return super().fields() | made | {"generations": {str(level): some for level, some in enumerate(self.generations)}}

    def materialise(self) -> MadePrecision:
        return self
