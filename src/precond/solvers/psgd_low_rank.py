"""PSGD's update of a low-rank factor, Q = (I + U V^T) diag(d): U, V (n, r), d (n,), and the norms "Lu", "Lv", "Ld"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def start(scale: Tensor, n: int, rank: int, generator: torch.Generator) -> dict[str, Any]:
    """The diagonal d = scale; U and V random, of Frobenius norm sqrt(0.1)."""
    U, V = (torch.randn(n, rank, dtype=scale.dtype, generator=generator).to(scale.device) for _ in range(2))
    none = torch.zeros((), dtype=scale.dtype, device=scale.device)
    U, V = (X * (0.1**0.5 / X.norm()) for X in (U, V))
    return {"U": U, "V": V, "d": scale.expand(n).clone(), "Lu": none, "Lv": none, "Ld": none}


def applied(Q: dict[str, Any], X: Tensor) -> Tensor:
    """Q^T Q X for columns (n, c)."""
    U, V, d = Q["U"], Q["V"], Q["d"].unsqueeze(1)
    Y = d * X
    Y = Y + U @ (V.mT @ Y)
    product: Tensor = d * (Y + V @ (U.mT @ Y))
    return product


def learn(Q: dict[str, Any], v: Tensor, h: Tensor, rate: Rate, *, U_moves: bool) -> dict[str, Any]:
    """One step of d, and of U or V, from pairs (m, n)."""
    U, V = _balanced(Q["U"], Q["V"])
    d = Q["d"]
    v, h, columns = v.mT, h.mT, d.unsqueeze(1)
    small = torch.eye(U.shape[1], dtype=U.dtype, device=U.device) + V.mT @ U
    y = columns * h
    a = y + U @ (V.mT @ y)
    Ph = columns * (a + V @ (U.mT @ a))
    x = v / columns
    b = x - V @ torch.linalg.solve(small.mT, U.mT @ x)
    Pv = (b - U @ torch.linalg.solve(small, V.mT @ b)) / columns
    new, pairs = dict(Q), h.shape[1]

    up, down = h * Ph, v * Pv
    gradient = (up - down).mean(1)
    size, new["Ld"] = rate(Q["Ld"], (up.abs().amax(0) + down.abs().amax(0)).mean(), gradient)
    new["d"] = d - size * gradient * d
    if U_moves:
        gradient = (a @ (a.mT @ V) - b @ (b.mT @ V)) @ small / pairs
        size, new["Lu"] = rate(Q["Lu"], _norm(a, V) + _norm(b, V), gradient)
        U = U - size * gradient
    else:
        gradient = ((a + V @ (U.mT @ a)) @ (a.mT @ U) - (b + V @ (U.mT @ b)) @ (b.mT @ U)) / pairs
        size, new["Lv"] = rate(Q["Lv"], _norm(a, U) + _norm(b, U), gradient)
        V = V - size * gradient
    return new | {"U": U, "V": V}


def _norm(a: Tensor, X: Tensor) -> Tensor:
    """The mean over pairs of |a| |X X^T a|."""
    mean: Tensor = (a.norm(dim=0) * (X @ (X.mT @ a)).norm(dim=0)).mean()
    return mean


def _balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U and V of one norm, their product as it was; and a small step towards U^T U = V^T V."""
    u, v = U.norm(), V.norm()
    rho = torch.where((u > 0) & (v > 0), u / torch.where(v > 0, v, 1.0), 1.0).sqrt()
    U, V = U / rho, rho * V
    total = U.square().sum() + V.square().sum()
    E = 0.1 * (U.mT @ U - V.mT @ V) / torch.where(total > 0, total, 1.0)
    return U - U @ (E - E @ E / 2), V + V @ (E + E @ E / 2)
