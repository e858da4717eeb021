"""Krylov spaces of dense matrices, by explicit orthogonalisation: the oracle of what is solved in them."""

from __future__ import annotations

import torch
from torch import Tensor


def basis(C: Tensor, b: Tensor, steps: int) -> Tensor:
    """(n, k) orthonormal columns that span b, C b, ..., C^(steps - 1) b; k < steps where these are dependent."""
    V = (b / b.norm()).unsqueeze(1)
    while V.shape[1] < min(steps, len(b)):
        wider = widened(V, C @ V[:, -1], 1e-13 * float(torch.linalg.matrix_norm(C, 2)))
        if wider is V:
            break
        V = wider
    return V


def widened(V: Tensor, x: Tensor, least: float) -> Tensor:
    """V and what x has outside its span, normed; V itself where that is at most `least`."""
    for _ in range(3):
        x = x - V @ (V.T @ x)
    return torch.cat([V, (x / x.norm()).unsqueeze(1)], 1) if x.norm() > least else V


def largest_magnitude(C: Tensor, start: Tensor, steps: int) -> float:
    """The largest |Ritz value| plus the norm of its residual, in the Krylov space of `start`."""
    V = basis(C, start, steps)
    values, vectors = torch.linalg.eigh(V.T @ C @ V)
    residuals = (C @ V @ vectors - V @ vectors * values).norm(dim=0)
    return float((values.abs() + residuals).max())
