"""The BFGS update from a secant pair, of a matrix and of its inverse, and what is done to pairs of little or no curvature.

A pair is a step s and the change y of the gradient along it; a matrix of the quadratic model satisfies B s = y. All
functions take stacks: B, H (*batch, n, n) and s, y (*batch, n). None waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Second = Literal["none", "mix", "add"]
Side = Literal["matrix", "inverse"]


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """How a pair is damped, and when it is passed over.

    powell: mu in [0, 1); where s^T y < mu s^T B s, y moves towards B s until they are equal (of the inverse: where
    s^T y < mu y^T H y, s moves towards H y). 0 turns it off. powell_on: which of the two where B is held, "matrix" or "inverse", H = B^-1;
    what follows H itself takes that of the inverse. second: what follows, with `amount` = mu_2: "mix" moves y
    towards s where s^T y < mu_2 s^T s, "add" adds mu_2 s. skip: a pair with s^T y <= skip |s| |y| changes nothing.
    scale_initial: the first pair that counts scales the identity it starts from by y^T y / s^T y. decay: s and y
    are running averages with this weight of the old value, from zero and without correction.
    """

    powell: float = 0.2
    powell_on: Side = "matrix"
    second: Second = "none"
    amount: float = 0.0
    skip: float = 1e-8
    scale_initial: bool = False
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.powell < 1:
            raise ValueError(f"powell={self.powell}: the fraction of the curvature below which a pair is damped lies in [0, 1); 0 turns it off.")
        if self.powell_on not in get_args(Side):
            raise ValueError(f"powell_on={self.powell_on!r}: choose one of {', '.join(map(repr, get_args(Side)))}.")
        if self.second not in get_args(Second):
            raise ValueError(f"second={self.second!r}: choose one of {', '.join(map(repr, get_args(Second)))}.")
        if self.amount < 0 or self.skip < 0 or not 0 <= self.decay < 1:
            raise ValueError(f"amount={self.amount}, skip={self.skip} and decay={self.decay} are at least 0, and decay is below 1.")

    def direct(self, B: Tensor, s: Tensor, y: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """B after the pair, and whether the pair counted (*batch). first: whether none has counted yet (*batch)."""
        s, y, counts = self.damp(s, y, lambda v: _times(B, v), lambda v: torch.linalg.solve_ex(B, v.unsqueeze(-1))[0].squeeze(-1))
        if self.scale_initial:
            B = B * torch.where(first & counts, _safe(_dot(y, y), _dot(s, y)), 1.0)[..., None, None]
        return torch.where(counts[..., None, None], update_direct(B, s, y), B), counts

    def damp(
        self, s: Tensor, y: Tensor, times: Callable[[Tensor], Tensor], solve: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pair, damped against B, which is given as v -> B v and v -> B^-1 v, and whether it counts."""
        if self.powell and self.powell_on == "matrix":
            Bs = times(s)
            y = _towards(y, Bs, _dot(s, y), _dot(s, Bs), self.powell)
        elif self.powell:
            s = self._powell_on_inverse(s, y, solve(y))
        y = self._second(s, y)
        return s, y, self._counts(s, y)

    def inverse(self, H: Tensor, s: Tensor, y: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """H, the inverse, after the pair, and whether the pair counted."""
        if self.powell:
            s = self._powell_on_inverse(s, y, _times(H, y))
        y = self._second(s, y)
        counts = self._counts(s, y)
        if self.scale_initial:
            H = H * torch.where(first & counts, _safe(_dot(s, y), _dot(y, y)), 1.0)[..., None, None]
        return torch.where(counts[..., None, None], update_inverse(H, s, y), H), counts

    def _powell_on_inverse(self, s: Tensor, y: Tensor, Hy: Tensor) -> Tensor:
        return _towards(s, Hy, _dot(s, y), _dot(y, Hy), self.powell)

    def _second(self, s: Tensor, y: Tensor) -> Tensor:
        if self.second == "mix":
            return _towards(y, s, _dot(s, y), _dot(s, s), self.amount)
        return y + self.amount * s if self.second == "add" else y

    def _counts(self, s: Tensor, y: Tensor) -> Tensor:
        curvature = _dot(s, y)
        enough: Tensor = curvature > self.skip * s.norm(dim=-1) * y.norm(dim=-1)
        return enough & curvature.isfinite()


def update_direct(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """B - B s s^T B / s^T B s + y y^T / s^T y: the symmetric matrix nearest to B, in its own metric, that satisfies the pair."""
    Bs = _times(B, s)
    return B - _outer(Bs, Bs) * _over(_dot(s, Bs)) + _outer(y, y) * _over(_dot(s, y))


def update_inverse(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """(I - rho s y^T) H (I - rho y s^T) + rho s s^T, rho = 1 / s^T y: the inverse of `update_direct` of H^-1."""
    Hy, rho = _times(H, y), _over(_dot(s, y))
    cross = _outer(Hy, s)
    return H - rho * (cross + cross.mT) + (rho * rho * _dot(y, Hy)[..., None, None] + rho) * _outer(s, s)


def _towards(moved: Tensor, goal: Tensor, inner: Tensor, size: Tensor, mu: float) -> Tensor:
    """The vector theta moved + (1 - theta) goal with the theta at which the inner product is mu times the size; as it was where it is not less."""
    short = inner < mu * size
    theta = torch.where(short, (1 - mu) * _safe(size, size - inner), 1.0)[..., None]
    return theta * moved + (1 - theta) * goal


def _times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(-1)


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u.unsqueeze(-1) * v.unsqueeze(-2)


def _safe(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / torch.where(denominator == 0, 1.0, denominator)


def _over(x: Tensor) -> Tensor:
    return _safe(torch.ones_like(x), x)[..., None, None]
