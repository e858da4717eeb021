"""SENG's economies for rows held as factors: few positions of each example, and a Gram matrix from few coordinates of each side."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.randomness import keyed_generator
from precond.representations.base import Statistics
from precond.representations.factored_rows import Pair

CHOSEN = ".coordinates"
"""Suffix of the coordinates drawn of one side of a pair."""


def few_positions(pair: Pair, positions: int) -> Pair:
    """The rows sum_r g_r (x) a_r of a (N, K or 1, R, in) and g (N, K, R, out) by the `positions` largest singular values of g of each.

    With g = P S Q^T they are the first of (S Q^T) and P^T a: exact where g has no larger rank, and off by at most the next singular value
    times |a|_2 elsewhere. Cost R out min(R, out) a row.
    """
    a, g = pair
    finite = g.isfinite().all()
    P, S, Q = torch.linalg.svd(torch.where(finite, g, 0.0), full_matrices=False)
    S = torch.where(finite, S, torch.nan)
    return P[..., :positions].mT @ a, S[..., :positions, None] * Q[..., :positions, :]


def draw(statistics: Statistics, q: int, seed: int) -> Statistics:
    """New coordinates of each side that has more than q, without replacement; of a side that stands alone q^2."""
    draws, drawn = int(statistics.get("draws", 0)) + 1, {}
    for i in range(sum(name.startswith("a") and name[1:].isdigit() for name in statistics)):
        sides = {side: statistics[f"{side}{i}"] for side in ("a", "g")}
        generator = keyed_generator(torch.device("cpu"), "sides", seed, draws, i, *(t.shape[-1] for t in sides.values()))
        for side, other in (("a", "g"), ("g", "a")):
            width, number = sides[side].shape[-1], q if sides[other].shape[-1] > 1 else q**2
            if width > number:
                drawn[f"{side}{i}{CHOSEN}"] = torch.randperm(width, generator=generator)[:number].to(sides[side].device)
    return statistics | drawn | {"draws": torch.tensor(draws)}


def on_few_coordinates(pair: Pair, inside: Tensor | None, outside: Tensor | None) -> Pair:
    """Rows whose products have those of all coordinates as their mean over all draws."""
    (a, g), scale = pair, 1.0
    if inside is not None:
        a, scale = a[..., inside], scale * a.shape[-1] / len(inside)
    if outside is not None:
        g, scale = g[..., outside], scale * g.shape[-1] / len(outside)
    return a, g * scale**0.5
