"""The second moment of a convolution's patches by lags: sums of products of shifted images, without any patch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from precond.layers.base import ROWS_AT_ONCE

_BUFFER = 1 << 21  # numbers of the moment that are put in order at once: what stays in a cache
Span = tuple[int, int]


@dataclass(frozen=True)
class Lag:
    """Of one dimension, the pairs (k, k') of kernel positions with k' - k = `steps`, which read pixels `shift` apart.

    spans: disjoint intervals of pixels p, of which the patches at k are made; cover[k][s]: whether those at k have span s.
    """

    steps: int
    shift: int
    spans: tuple[Span, ...]
    cover: tuple[tuple[float, ...], ...]

    @property
    def width(self) -> int:
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True)
class Line:
    """One dimension of a convolution of stride 1: pixels, kernel, dilation, zeros in front, and output places.

    The first position of a kernel of 3 does not read the last pixel, nor the last position the first one:

    >>> Line(size=5, kernel=3, dilation=1, padding=1, places=5).lag(0)
    Lag(steps=0, shift=0, spans=((0, 1), (1, 4), (4, 5)), cover=((1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)))
    """

    size: int
    kernel: int
    dilation: int
    padding: int
    places: int

    def lag(self, steps: int) -> Lag:
        """What p must be for x[p] x[p + shift] to count at k, p = place + dilation k - padding, both pixels in the image: an interval."""
        shift = steps * self.dilation
        inside = (max(0, -shift), min(self.size, self.size - shift))
        starts = [k * self.dilation - self.padding for k in range(max(0, -steps), self.kernel - max(0, steps))]
        reads = [(max(s, inside[0]), min(s + self.places, inside[1])) for s in starts]
        ends = sorted({p for start, end in reads if start < end for p in (start, end)})
        spans = [(a, b) for a, b in pairwise(ends) if any(start <= a and b <= end for start, end in reads)]
        cover = tuple(tuple(float(start <= a and b <= end) for a, b in spans) for start, end in reads)
        return Lag(steps, shift, tuple(spans), cover)


Found = tuple[tuple[Lag, ...], Tensor]
"""One lag a dimension, and the products (*spans, G, C / G, C / G) of the images that far apart."""


def halves(lines: Sequence[Line]) -> Iterator[tuple[list[Lag], tuple[Lag, ...]]]:
    """(lags of the first dimension, one lag of each other): of a lag and its opposite one of them, whose blocks are each other's transpose."""
    for steps in product(*(range(1 - line.kernel, line.kernel) for line in lines[1:])):
        zero = (0,) * len(steps)
        if steps >= zero:
            first = range(0 if steps == zero else 1 - lines[0].kernel, lines[0].kernel)
            yield [lines[0].lag(s) for s in first], tuple(line.lag(s) for line, s in zip(lines[1:], steps, strict=True))


def pieces(examples: int, images: int, moment: int) -> int:
    """In how many pieces so many images are read: what is copied at once is no larger than the moment, or a fixed number."""
    return max(1, min(examples, math.ceil(images / max(ROWS_AT_ONCE, moment))))


def patch_moment(x: Tensor, groups: int, lines: Sequence[Line], out: Tensor) -> None:
    """Write the sum over rows of a a^T into `out` (G, C / G * K, C / G * K), for images (M, C, *sizes) and a patch a of (C / G, *kernel).

    Entry ((c, k), (c', k')) is the sum over p of x_c[p] x_c'[p + lag]: it depends on k and k' through their lag, up to which strips at the
    border count. So every lag has one product of shifted images for the core and one a strip, and blocks are sums of a few of them.
    The images are rearranged to (G, C / G, first dimension, M, others), in which shifts along the first dimension are views; those along the
    others are copied, once each.
    """
    channels, pairs = x.shape[1] // groups, list(halves(lines))
    found: list[list[Found]] = [
        [((first, *others), x.new_zeros(*(len(lag.spans) for lag in (first, *others)), groups, channels, channels)) for first in firsts]
        for firsts, others in pairs
    ]
    for piece in x.split(-(-len(x) // pieces(len(x), x.numel(), out.numel()))):
        image = piece.unflatten(1, (groups, channels)).movedim(0, 3).contiguous()
        for products, (_, others) in zip(found, pairs, strict=True):
            _accumulate(image, products, others)
    _assemble([one for products in found for one in products], [line.kernel for line in lines], out)


def _accumulate(image: Tensor, products: Sequence[Found], others: Sequence[Lag]) -> None:
    """Add the products of a chunk (G, C / G, first, M, *others), by span, of the lags that have these lags of the other dimensions."""
    for index in product(*(range(len(lag.spans)) for lag in others)):
        spans = [lag.spans[i] for lag, i in zip(others, index, strict=True)]
        left = _cut(image, spans, [0] * len(spans))
        right = left if not any(lag.shift for lag in others) else _cut(image, spans, [lag.shift for lag in others])
        for (first, *_), sums in products:
            for i, (start, end) in enumerate(first.spans):
                a, b = left[:, :, start:end].flatten(2), right[:, :, start + first.shift : end + first.shift].flatten(2)
                sums[(i, *index)].baddbmm_(a, b.mT)


def _cut(image: Tensor, spans: Sequence[Span], shifts: Sequence[int]) -> Tensor:
    """(G, C / G, first, M * others), the others cut to spans; a copy where that is less than all."""
    for dim, ((start, end), shift) in enumerate(zip(spans, shifts, strict=True), 4):
        image = image.narrow(dim, start + shift, end - start)
    return image.flatten(3)


def _assemble(found: Sequence[Found], kernel: Sequence[int], out: Tensor) -> None:
    """The blocks (k, k') of all lags and their mirror images, in the order of patches, some channels c at a time."""
    taps = math.prod(kernel)
    groups, channels = out.shape[0], out.shape[1] // taps
    view = out.unflatten(2, (channels, taps)).unflatten(1, (channels, taps))
    step = min(channels, max(1, _BUFFER // (groups * channels * taps**2)))
    buffer = out.new_empty(groups * taps * step * taps * channels)
    for start in range(0, channels, step):
        size = min(step, channels - start)
        # kernel positions first, so that whole rows are written: each of its blocks belongs to one lag
        blocks = buffer[: buffer.numel() // step * size].view(groups, *kernel, size, *kernel, channels)
        for lags, sums in found:
            steps = [lag.steps for lag in lags]
            _diagonal(blocks, steps).copy_(_values(lags, sums.narrow(-2, start, size)))
            if any(steps):
                _diagonal(blocks, [-s for s in steps]).copy_(_values(lags, sums.narrow(-1, start, size)).mT)
        view.narrow(1, start, size).copy_(blocks.view(groups, taps, size, taps, channels).permute(0, 2, 1, 4, 3))


def _values(lags: Sequence[Lag], sums: Tensor) -> Tensor:
    """(*n, G, c, c'): for every kernel position of a lag the sum of the products of its spans."""
    ends, shape = sums.shape[len(lags) :], [len(lag.cover) for lag in lags]
    if all(all(row == (1.0,) for row in lag.cover) for lag in lags):
        return sums.expand(*shape, *ends)
    cover = sums.new_ones(1, 1)
    for lag in lags:
        cover = torch.kron(cover, sums.new_tensor(lag.cover).view(len(lag.cover), len(lag.spans)))
    return (cover @ sums.reshape(cover.shape[1], math.prod(ends))).view(*shape, *ends)


def _diagonal(blocks: Tensor, steps: Sequence[int]) -> Tensor:
    """(*n, G, c, c'), a view of the blocks with k' - k = steps."""
    for left, s in zip(range(len(steps), 0, -1), steps, strict=True):
        blocks = blocks.diagonal(offset=s, dim1=1, dim2=left + 2)
    return blocks.permute(*range(3, blocks.dim()), 0, 1, 2)
