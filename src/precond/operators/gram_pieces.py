"""Pieces of the rows of a `Gram`: disjoint coordinates, each with its own cheap way to U U^T, U V and U^T B."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**20
"""Numbers that an intermediate tensor may hold even where n^2 and the piece itself are smaller: below it, calls cost more than memory."""


class Piece(ABC):
    """The columns of U (*batch, n, p) that belong to one parameter or layer."""

    batch: torch.Size
    rank: int
    size: int

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What it is made of, a floating point tensor first."""

    @abstractmethod
    def gram(self) -> Tensor:
        """U U^T, (*batch, n, n)."""

    @abstractmethod
    def left(self, V: Tensor) -> Tensor:
        """U V: (*batch, p, k) -> (*batch, n, k)."""

    @abstractmethod
    def right(self, B: Tensor) -> Tensor:
        """U^T B: (*batch, n, k) -> (*batch, p, k)."""

    def right_into(self, B: Tensor, out: Tensor) -> None:
        """Write U^T B into `out` (*batch, p, k), part of a longer vector whose memory is not initialised."""
        out.copy_(self.right(B))

    @abstractmethod
    def rows(self) -> Iterator[Tensor]:
        """U a few columns at a time, (*batch, n, chunk)."""


class PlainRows(Piece):
    """Rows held as they are, (*batch, n, p)."""

    def __init__(self, rows: Tensor) -> None:
        if rows.dim() < 2:
            raise ValueError(f"rows of a Gram are (n, p), not shape {tuple(rows.shape)}.")
        self.explicit, self.batch, self.rank, self.size = rows, rows.shape[:-2], rows.shape[-2], rows.shape[-1]

    def fields(self) -> dict[str, Any]:
        return {"rows": self.explicit}

    def gram(self) -> Tensor:
        return self.explicit @ self.explicit.mT

    def left(self, V: Tensor) -> Tensor:
        return self.explicit @ V

    def right(self, B: Tensor) -> Tensor:
        return self.explicit.mT @ B

    def rows(self) -> Iterator[Tensor]:
        yield self.explicit


class PositionRows(Piece):
    """Row (k, i) is a sum over R shared positions of products of an input, the same for all k, and an output gradient."""

    g: Tensor
    """(*batch, K, N, R, out), n = K N rows."""

    @abstractmethod
    def _inputs(self, some: Tensor) -> Tensor:
        """Inner products of the inputs at some positions with those at all N R."""

    def _by_positions(self) -> Tensor:
        """Sum over pairs of positions of (a_ir . a_js)(g_ir . g_js), some positions at a time."""
        K, N, R = self.g.shape[-4:-1]
        g = self.g.flatten(-3, -2)
        owner = torch.arange(N, device=g.device).repeat_interleave(R)
        total = g.new_zeros(*self.batch, K, N, K, N)
        for some in torch.arange(N * R, device=g.device).split(self._step(self.batch.numel() * K * K * N * R)):
            A, part = self._inputs(some), g[..., some, :].flatten(-3, -2)
            G = (part @ g.flatten(-3, -2).mT).reshape(*self.batch, K, len(some), K, N * R)
            G = G.mul_(A[..., None, :, None, :]).unflatten(-1, (N, R)).sum(-1)
            total.index_add_(total.dim() - 3, owner[some], G)
        return total.reshape(*self.batch, self.rank, self.rank)

    @property
    @abstractmethod
    def _held(self) -> int:
        """The size of its largest tensor."""

    def _step(self, numbers: int) -> int:
        """How many at a time, each of so many numbers: as many as fit in what is held anyway."""
        return max(1, max(CHUNK, self.batch.numel() * self.rank**2, self._held) // max(1, numbers))


class OuterRows(PositionRows):
    """Row (k, i) is vec(sum_r g_kir a_ir^T), of shape (out, in), never formed.

    Args:
        a: (*batch, N, R, in).
        g: (*batch, n, R, out), n = K N rows, k outermost; N is that of `a`, which all K share. The batch of `a` may be of ones.
    """

    def __init__(self, a: Tensor, g: Tensor) -> None:
        lead = g.shape[:-3]
        fits = a.dim() >= 3 and g.dim() == a.dim() and a.shape[-2] == g.shape[-2] and a.shape[-3] > 0 and g.shape[-3] % a.shape[-3] == 0
        if not fits or any(x not in (1, y) for x, y in zip(a.shape[:-3], lead, strict=True)):
            raise ValueError(
                f"a layer of a Gram is a (*batch, N, R, in) and g (*batch, K N, R, out), not {tuple(a.shape)} and {tuple(g.shape)}."
            )
        self.a, self.flat = a, g
        self.batch, self.rank, self.size = lead, g.shape[-3], g.shape[-1] * a.shape[-1]
        self.g = g.reshape(*lead, g.shape[-3] // a.shape[-3], *a.shape[-3:-1], g.shape[-1])  # (*batch, K, N, R, out)

    def fields(self) -> dict[str, Any]:
        return {"a": self.a, "g": self.flat}

    @property
    def _held(self) -> int:
        return max(self.a.numel(), self.g.numel())

    def _inputs(self, some: Tensor) -> Tensor:
        a = self.a.flatten(-3, -2)
        return a[..., some, :] @ a.mT

    def gram(self) -> Tensor:
        (K, N, R, out), wide = self.g.shape[-4:], self.a.shape[-1]
        if R == 1:
            return self._hadamard()
        by_positions = (K * N * R) ** 2 * out + (N * R) ** 2 * wide
        by_gradients = self.rank * out * wide * (R + self.rank)
        return self._by_positions() if by_positions <= by_gradients else self._by_gradients()

    def _hadamard(self) -> Tensor:
        """(A A^T) o (G G^T) of two small Grams."""
        K, N = self.g.shape[-4:-2]
        A, g = self.a.squeeze(-2), self.flat.squeeze(-2)
        G = (g @ g.mT).reshape(*self.batch, K, N, K, N)
        return G.mul_((A @ A.mT)[..., None, :, None, :]).reshape(*self.batch, self.rank, self.rank)

    def _by_gradients(self) -> Tensor:
        """Of the gradients by example, some of their columns at a time, each formed once."""
        total = self.flat.new_zeros(*self.batch, self.rank, self.rank)
        for rows in self.rows():
            total += rows @ rows.mT
        return total

    def rows(self) -> Iterator[Tensor]:
        for g in self.g.split(self._step(self.batch.numel() * self.rank * self.a.shape[-1]), dim=-1):
            yield torch.einsum("...knro,...nri->...knoi", g, self.a).flatten(-2).flatten(-3, -2)

    def left(self, V: Tensor) -> Tensor:
        W = V.reshape(*self.batch, self.g.shape[-1], self.a.shape[-1], -1)
        if W.shape[-3] <= W.shape[-2]:  # contract the wider side first: the product of the two is the larger intermediate
            inside = torch.einsum("...nri,...oik->...nrok", self.a, W)
            return torch.einsum("...knro,...nroc->...knc", self.g, inside).flatten(-3, -2)
        inside = torch.einsum("...knro,...oic->...knric", self.g, W)
        return torch.einsum("...nri,...knric->...knc", self.a, inside).flatten(-3, -2)

    def right(self, B: Tensor) -> Tensor:
        return torch.einsum("...nroc,...nri->...oic", self._weighted(B), self.a).flatten(-3, -2)

    def right_into(self, B: Tensor, out: Tensor) -> None:
        if self.batch or B.shape[-1] != 1:
            super().right_into(B, out)
            return
        weighted = self._weighted(B).flatten(0, 1).squeeze(-1)
        out.view(self.g.shape[-1], -1).addmm_(weighted.mT, self.a.flatten(0, 1), beta=0)  # beta 0: what is there is not read

    def _weighted(self, B: Tensor) -> Tensor:
        """Sum over k of b_ki g_kir, (*batch, N, R, out, c) for c columns b."""
        return torch.einsum("...knro,...knc->...nroc", self.g, B.reshape(*self.batch, *self.g.shape[-4:-2], -1))


class OneHotRows(PositionRows):
    """Row (k, i) has g_kir added to row `index_ir` of a table (size, width): the gradients of an embedding, never formed.

    Args:
        index: (N, R) int64.
        g: (n, R, width), n = K N rows, k outermost; zero where a position does not count.
        size: the number of rows of the table.
    """

    def __init__(self, index: Tensor, g: Tensor, size: int) -> None:
        if index.dim() != 2 or g.dim() != 3 or g.shape[1] != index.shape[1] or g.shape[0] % max(1, len(index)):
            raise ValueError(
                f"an embedding of a Gram is index (N, R) and g (K N, R, width), not {tuple(index.shape)} and {tuple(g.shape)}."
            )
        self.index, self.flat, self.table = index, g, size
        self.batch, self.rank, self.size = torch.Size(), len(g), size * g.shape[-1]
        self.g = g.reshape(-1, *index.shape, g.shape[-1])

    def fields(self) -> dict[str, Any]:
        return {"g": self.flat, "index": self.index, "size": self.table}

    @property
    def _held(self) -> int:
        return self.g.numel()

    def _inputs(self, some: Tensor) -> Tensor:
        index = self.index.flatten()
        return (index[some].unsqueeze(1) == index).to(self.g.dtype)

    def gram(self) -> Tensor:
        return self._by_positions()

    def left(self, V: Tensor) -> Tensor:
        return torch.einsum("knrd,nrdc->knc", self.g, V.reshape(self.table, self.g.shape[-1], -1)[self.index]).flatten(0, 1)

    def right(self, B: Tensor) -> Tensor:
        weighted = torch.einsum("knrd,knc->nrdc", self.g, B.reshape(*self.g.shape[:2], -1)).flatten(0, 1)
        return weighted.new_zeros(self.table, *weighted.shape[1:]).index_add_(0, self.index.flatten(), weighted).flatten(0, 1)

    def rows(self) -> Iterator[Tensor]:
        width = self.g.shape[-1]
        owner = torch.arange(self.rank, device=self.g.device).unsqueeze(1)
        for some in torch.arange(self.table, device=self.g.device).split(self._step(self.rank * width)):
            place = self.index.repeat(len(self.g), 1) - some[0]
            place = torch.where((place >= 0) & (place < len(some)), place, len(some))  # elsewhere: into a slot that is cut off
            table = self.g.new_zeros(self.rank * (len(some) + 1), width)
            table.index_add_(0, (owner * (len(some) + 1) + place).flatten(), self.flat.flatten(0, 1))
            yield table.view(self.rank, len(some) + 1, width)[:, :-1].flatten(1)
