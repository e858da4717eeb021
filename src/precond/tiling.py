"""The shape in which a tensor is held, and the order of its entries where long dimensions are cut into tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """A tensor read as one of `shape`, its dimension m cut into pieces of the lengths `pieces[m]`, equal ones side by side.

    Tiles of one shape form a group, and a vector is group after group, each (b, n_1, ..., n_k) row-major: b tiles. Pieces have at most
    two lengths a dimension, so that there are at most 2^k groups.

    >>> Tiling((4, 3), ((2, 2), (3,))).arrange(torch.arange(12)).view(2, 2, 3).tolist()
    [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    >>> str(Tiling((785, 512), ((393, 392), (512,))))
    '785 x 512 in 1 tile of 393 x 512 and 1 of 392 x 512'
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """(b, n_1, ..., n_k) of every group."""
        return [(math.prod(count for _, count, _ in runs), *(length for *_, length in runs)) for runs in self._runs()]

    @property
    def cut(self) -> bool:
        """Whether there is more than one tile."""
        return any(len(lengths) > 1 for lengths in self.pieces)

    def arrange(self, vector: Tensor) -> Tensor:
        """Entries (*lead, n) in the tensor's order -> in the order of the tiles."""
        if not self.cut:
            return vector
        lead, tensor = vector.shape[:-1], vector.reshape(*vector.shape[:-1], *self.shape)
        parts = []
        for runs in self._runs():
            part = tensor
            for m, (start, count, length) in enumerate(runs):
                part = part.narrow(len(lead) + m, start, count * length)
            grid = part.reshape(*lead, *(size for _, count, length in runs for size in (count, length)))
            parts.append(grid.permute(*range(len(lead)), *self._order(len(lead))).flatten(len(lead)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def restore(self, vector: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        if not self.cut:
            return vector
        lead = vector.shape[:-1]
        tensor = vector.new_empty(*lead, *self.shape)
        inverse = sorted(range(2 * len(self.shape)), key=self._order(0).__getitem__)
        for runs, part in zip(self._runs(), self.split(vector), strict=True):
            grid = part.reshape(*lead, *(count for _, count, _ in runs), *(length for *_, length in runs))
            whole = grid.permute(*range(len(lead)), *(len(lead) + i for i in inverse))
            place = tensor
            for m, (start, count, length) in enumerate(runs):
                place = place.narrow(len(lead) + m, start, count * length)
            place.copy_(whole.reshape(place.shape))
        return tensor.flatten(len(lead))

    def split(self, vector: Tensor) -> list[Tensor]:
        """Entries (*lead, n) in the order of the tiles -> (*lead, b, n_1, ..., n_k) of every group."""
        groups = self.groups
        parts = vector.split([math.prod(group) for group in groups], -1)
        return [part.unflatten(-1, group) for part, group in zip(parts, groups, strict=True)]

    def _runs(self) -> Iterator[tuple[tuple[int, int, int], ...]]:
        """Of every group, where its pieces start in each dimension, how many there are, and their length."""
        return itertools.product(*(list(_runs(lengths)) for lengths in self.pieces))

    def _order(self, lead: int) -> list[int]:
        """(count_1, n_1, count_2, n_2, ...) -> (count_1, count_2, ..., n_1, n_2, ...)."""
        k = len(self.shape)
        return [lead + 2 * m for m in range(k)] + [lead + 2 * m + 1 for m in range(k)]

    def __str__(self) -> str:
        whole = " x ".join(map(str, self.shape))
        if not self.cut:
            return whole
        tiles = [f"{b} of {' x '.join(map(str, sizes))}" for b, *sizes in self.groups]
        tiles[0] = tiles[0].replace(" of", " tile of" if self.groups[0][0] == 1 else " tiles of", 1)
        return f"{whole} in {' and '.join(tiles)}"


def _runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for length, equal in itertools.groupby(lengths):
        count = len(list(equal))
        yield start, count, length
        start += count * length


def even_pieces(length: int, longest: int) -> tuple[int, ...]:
    """As few pieces of at most `longest` as there can be, as equal as they can be, the longer ones first.

    >>> even_pieces(785, 400), even_pieces(8, 8)
    ((393, 392), (8,))
    """
    count = -(-length // longest)
    return tuple(length // count + (i < length % count) for i in range(count))
