"""Pure functions of loss curves: smoothing, and when a level was reached."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]


def trailing_mean(losses: Sequence[float], window: int) -> Curve:
    """The mean of the last `window` values at every step; fewer at the start, where there are fewer.

    >>> trailing_mean([4.0, 2.0, 0.0], window=2).tolist()
    [4.0, 3.0, 1.0]
    """
    values = np.asarray(losses, dtype=np.float64)
    means = [values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)]
    return np.asarray(means, dtype=np.float64)


def steps_to_loss(losses: Sequence[float], level: float, window: int) -> int | None:
    """The first step (counted from 1) after which the mean of the last `window` losses is at most `level`.

    Steps before the window is full do not count: one easy batch is not a level reached. `None` if
    it never is.

    >>> steps_to_loss([3.0, 1.0, 1.0, 1.0], level=1.0, window=2)
    3
    """
    means = trailing_mean(losses, window)
    reached = np.flatnonzero(means[window - 1 :] <= level)
    return int(reached[0]) + window if len(reached) else None


def steps_to_accuracy(accuracies: Sequence[float], at_steps: Sequence[int], level: float) -> int | None:
    """The first step at which a measured accuracy is at least `level`; `None` if none is.

    >>> steps_to_accuracy([0.5, 0.9, 0.8], [10, 20, 30], level=0.8)
    20
    """
    return next((step for step, value in zip(at_steps, accuracies, strict=True) if value >= level), None)


def resample(curves: Sequence[Curve], times: Sequence[Curve], points: int = 400) -> tuple[Curve, Curve]:
    """Curves of several runs on one time grid, over the span that all of them cover.

    Returns the grid and an array with a row per run; values are interpolated in the logarithm, as
    they are drawn.
    """
    first = max(float(t[0]) for t in times)
    last = min(float(t[-1]) for t in times)
    grid = np.geomspace(first, max(last, first), points)
    rows = [np.exp(np.interp(grid, t, np.log(np.maximum(c, 1e-12)))) for c, t in zip(curves, times, strict=True)]
    return grid, np.stack(rows)
