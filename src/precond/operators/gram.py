"""A low-rank matrix whose rows are never formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from precond.operators.gram_pieces import OneHotRows, OuterRows, Piece, PlainRows
from precond.operators.row_form import RowForm

Layer = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]


class Gram(RowForm):
    """U^T W U with rows u = sum_r g_r (x) a_r, the gradients of a layer by example, kept as their factors.

    Args:
        pieces: disjoint coordinates of the rows, one after another. Each is a pair (a, g), a (*batch, N, R, in) and
            g (*batch, n, R, out) with R shared positions and n a multiple K N of N (row k N + i has the inputs of example i), on
            coordinates (out, in) row-major; or an embedding (index, g, size), index (N, R) int64 and g (n, R, out), on coordinates
            (size, out) and without a batch; or plain rows (*batch, n, p), for what has no such factors. All have the same n and batch; a
            batch of `a` may be of ones. Scales and loss weights belong in g, and the homogeneous 1 in a.
        weights, gram: as for `LowRank`; weights I - c c^T take off the mean row U^T c.

    The Gram matrix is the sum over pieces of (A A^T) o (G G^T) for R = 1, n^2 (in + out); for R > 1 of a sum over pairs of positions,
    n^2 R^2 (in + out), or of gradients formed some columns at a time, n in out (R + n), whichever is cheaper. Products with U
    and U^T are contractions, n R in out. It holds the pieces and n^2 numbers, never n p.
    Sources: Ren and Goldfarb 2019 (arXiv 1906.02353); Dangel et al. 2022 (ViViT, arXiv 2106.02624).

    >>> C = Gram([(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]))])
    >>> C.gram, C.to_dense()
    (tensor([[45.]]), tensor([[ 9., 18.],
            [18., 36.]]))
    """

    def __init__(self, pieces: Sequence[Layer | Tensor], weights: Tensor | None = None, gram: Tensor | None = None) -> None:
        if not pieces:
            raise ValueError("Gram needs at least one piece.")
        self.pieces = tuple(_piece(piece) for piece in pieces)
        self.weights, self._known_gram = weights, gram
        kinds = {(piece.rank, tuple(piece.batch)) for piece in self.pieces}
        if len(kinds) > 1:
            raise ValueError(f"the pieces of a Gram have one number of rows and one batch, not {sorted(kinds)}.")
        self._check_weights()

    @property
    def batch(self) -> torch.Size:
        return self.pieces[0].batch

    @property
    def rank(self) -> int:
        return self.pieces[0].rank

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def _like(self) -> Tensor:
        like: Tensor = next(iter(self.pieces[0].fields().values()))
        return like

    def fields(self) -> dict[str, Any]:
        return {"pieces": {str(i): piece.fields() for i, piece in enumerate(self.pieces)}} | self._extra_fields()

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        saved: Mapping[str, Mapping[str, Any]] = fields["pieces"]
        return cls([_given(piece) for piece in saved.values()], fields.get("weights"), fields.get("gram"))

    def unweighted(self) -> Gram:
        if self.weights is None and self._known_gram is None:
            return self
        return Gram.from_fields({"pieces": self.fields()["pieces"]})

    def _compute_gram(self) -> Tensor:
        total = self.pieces[0].gram()
        for piece in self.pieces[1:]:
            total.add_(piece.gram())
        return total

    def _left(self, V: Tensor) -> Tensor:
        parts = V.split([piece.size for piece in self.pieces], dim=-2)
        total = self.pieces[0].left(parts[0])
        for piece, part in zip(self.pieces[1:], parts[1:], strict=True):
            total = total + piece.left(part)
        return total

    def _right(self, B: Tensor) -> Tensor:
        total = B.new_empty(*self.batch, self.size, B.shape[-1])  # as long as the parameters: written once, and joined by no copy
        start = 0
        for piece in self.pieces:
            piece.right_into(B, total.narrow(-2, start, piece.size))
            start += piece.size
        return total

    def to_dense(self) -> Tensor:
        rows = torch.cat([chunk for piece in self.pieces for chunk in piece.rows()], dim=-1)  # n p, less than the p^2 asked for
        stack = rows.mT @ self.weigh(rows)
        return torch.block_diag(*stack.flatten(0, -3)) if self.batch else stack

    def diagonal(self) -> Tensor:
        parts = [(rows * self.weigh(rows)).sum(-2) for piece in self.pieces for rows in piece.rows()]
        return torch.cat(parts, dim=-1).reshape(-1)


def _piece(given: Layer | Tensor) -> Piece:
    if isinstance(given, Tensor):
        return PlainRows(given)
    return OuterRows(*given) if len(given) == 2 else OneHotRows(*given)


def _given(fields: Mapping[str, Any]) -> Layer | Tensor:
    """What the piece that has these fields was made from."""
    if "rows" in fields:
        rows: Tensor = fields["rows"]
        return rows
    return (fields["a"], fields["g"]) if "a" in fields else (fields["index"], fields["g"], fields["size"])
