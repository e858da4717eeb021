"""What the second moment of a convolution's patches costs, with the patches and by lags (`precond.layers.lags`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from precond.layers.base import ROWS_AT_ONCE
from precond.layers.lags import Line, halves, pieces

# Fitted to 33 shapes on one x86 core in float32, CPU seconds, at 8 GB/s (benchmarks/conv_factors.py measures some of them): the model is
# within a factor of 1.5 of most ratios of the two, and takes the faster one but for near ties. A call on an accelerator is taken as 5
# microseconds at 2 TB/s, which was not measured.
FLOPS_A_BYTE = 16.0
BYTES_A_CALL = {"cpu": 60e3}
BYTES_A_LAUNCH = 10e6


@dataclass(frozen=True)
class Cost:
    """Floating point operations, bytes read or written, and calls of a kernel.

    >>> line = Line(size=56, kernel=3, dilation=1, padding=1, places=56)  # a ResNet's 64 channels at 56 x 56, batch 32, float32
    >>> for count in by_patches, by_lags:
    ...     cost = count(32, 64, 1, [line, line], itemsize=4)
    ...     print(f"{cost.flops / 1e9:.1f} Gflop, {cost.bytes / 1e6:.0f} MB, {cost.calls:.0f} calls, as {cost.total() / 1e6:.0f} MB moved")
    66.6 Gflop, 821 MB, 320 calls, as 5002 MB moved
    10.3 Gflop, 327 MB, 818 calls, as 1017 MB moved
    """

    flops: float
    bytes: float
    calls: float

    def total(self, device: str = "cpu") -> float:
        """In bytes moved in the same time."""
        return self.flops / FLOPS_A_BYTE + self.bytes + self.calls * BYTES_A_CALL.get(device, BYTES_A_LAUNCH)


def by_patches(examples: int, channels: int, groups: int, lines: Sequence[Line], itemsize: int) -> Cost:
    """Of rows (N places, C / G K), some examples at a time: 2 N places G (C / G K)^2 operations.

    Moved are each row, written once and read twice, and the moment at each piece.
    """
    width = channels // groups * math.prod(line.kernel for line in lines)
    rows = examples * math.prod(line.places for line in lines)
    moment, numbers = groups * width**2, rows * groups * width
    times = min(examples, math.ceil(numbers / max(ROWS_AT_ONCE, moment)))
    return Cost(2.0 * rows * groups * width**2, itemsize * 3.0 * (numbers + times * moment), 10.0 * times)


def by_lags(examples: int, channels: int, groups: int, lines: Sequence[Line], itemsize: int) -> Cost:
    """Of `patch_moment`: 2 N G (C / G)^2 operations a pixel that a lag's spans have, for half of the lags.

    Moved are the images, two copies of them a lag of all dimensions but the first, the products of every span, and twice the moment.
    """
    inner, kernel = channels // groups, math.prod(line.kernel for line in lines)
    images, moment = examples * channels * math.prod(line.size for line in lines), groups * (inner * kernel) ** 2
    times = pieces(examples, images, moment)
    pixels = products = copied = copies = lags = 0
    for firsts, others in halves(lines):
        spans, across = math.prod(len(lag.spans) for lag in others), math.prod(lag.width for lag in others)
        sides = 2 if any(lag.shift for lag in others) else 1
        copied, copies = copied + sides * across * lines[0].size, copies + sides * spans
        pixels, products = pixels + across * sum(lag.width for lag in firsts), products + spans * sum(len(lag.spans) for lag in firsts)
        lags += len(firsts)
    moved = 2.0 * (images + examples * channels * copied + times * products * groups * inner**2) + 4.0 * moment
    return Cost(2.0 * examples * groups * inner**2 * pixels, itemsize * moved, times * (products + copies + 1.0) + 6.0 * lags)
