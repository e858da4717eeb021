"""BFGS on an operator known by its products: the inverse follows pairs (H v, C H v) of directions v that it chooses itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from precond.secant import PairRule

Product = Callable[[Tensor], Tensor]


def follow(
    H: Tensor, product: Product, count: int, rule: PairRule, counted: Tensor, draw: Callable[[], Tensor], *, everywhere: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """H (b, n, n) after `count` pairs, and how many have counted in each matrix, (b,).

    s = H v, y = C s with v normal and orthogonal to the s before it: then s_i^T C s_j = v_i^T H C s_j = v_i^T s_j = 0, since H C s_j = s_j.
    Steps that are conjugate leave what was learned along the others as it was, so that n of them make H the inverse of a definite C,
    whatever its spectrum.

    Args:
        product: v -> C v for v (b, n), the matrices of a stack side by side.
        draw: a new v (b, n).
        everywhere: the first s is v itself. H v alone would stay where H is large already, and never come to directions in which C has
            become much smaller.
    """
    n = H.shape[-1]
    basis = H[..., :0]  # of the span of the steps
    for k in range(count):
        if k % n == 0:
            basis = H[..., :0]
        v = _outside(basis, draw())
        s = v if everywhere and k == 0 else step(H, v)
        H, counts = rule.inverse(H, s, product(s), counted == 0)
        counted = counted + counts
        u = _outside(basis, s)
        size = u.norm(dim=-1, keepdim=True)
        basis = torch.cat([basis, (u / torch.where(size > 0, size, 1.0)).unsqueeze(-1)], -1)
    return H, counted


def step(H: Tensor, v: Tensor) -> Tensor:
    """H v, its largest entry 1: an update does not see the length of its pair, and products of what a spike left of H would underflow."""
    s = (H @ v.unsqueeze(-1)).squeeze(-1)
    size = s.abs().amax(-1, keepdim=True)
    return s / torch.where(size > 0, size, 1.0)


def _outside(basis: Tensor, v: Tensor) -> Tensor:
    """The part of v (b, n) outside the span of an orthonormal basis (b, n, k)."""
    for _ in range(2):
        v = v - (basis @ (basis.mT @ v.unsqueeze(-1))).squeeze(-1)
    return v
