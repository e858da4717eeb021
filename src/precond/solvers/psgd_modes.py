"""PSGD's updates of triangular, diagonal and Kronecker factors; a dense or a diagonal Q is one of a single mode.

Q is a dict: "0", "1", ... by mode, (b, n_m, n_m) or (b, n_m), none where a mode has the identity, and "L0", "L1", ..., the norms (b,).
Vectors are (m, b, n_1, ..., n_k), m pairs, over which the gradient is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from precond.operators import Fit, mode_products

Rate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Bound = Literal["diagonal", "column"]
_BALANCE = 100  # updates between two balances of the factors
_FEW = 8  # a product of matrices costs as much as so many vectors for each column


def start(scale: Tensor, fit: Fit) -> dict[str, Any]:
    """Q = scale I, with the same multiple in each factor."""
    kept = [(m, n, form) for m, (n, form) in enumerate(zip(fit.sizes, fit.forms, strict=True)) if form != "identity"]
    share, Q = scale ** (1 / max(len(kept), 1)), dict[str, Any]()
    for m, n, form in kept:
        ones = torch.ones(fit.batch, n, dtype=scale.dtype, device=scale.device)
        Q[str(m)] = share * (torch.diag_embed(ones) if form == "dense" else ones)
        Q[f"L{m}"] = torch.zeros(fit.batch, dtype=scale.dtype, device=scale.device)
    return Q


def factors(Q: dict[str, Any], order: int) -> list[Tensor | None]:
    """Q by mode."""
    return [Q.get(str(m)) for m in range(order)]


def learn(Q: dict[str, Any], v: Tensor, h: Tensor, rate: Rate, count: int, *, inverse_free: bool, whitening: bool, bound: Bound) -> dict[str, Any]:
    """One step of every factor, from the old ones."""
    old = factors(Q, v.dim() - 2)
    if inverse_free:
        A, B = _modes(old, _modes(old, h), transpose=True), v
    else:
        A, B = _modes(old, h), _inverse_transposed(old, v)
    new, made = dict(Q), [F for F in old if F is not None]
    single = len(made) == 1 and not inverse_free and bound == "diagonal"
    for m, F in enumerate(old):
        if F is None:
            continue
        diagonal = F.dim() == 2
        a = _contract(A, m, diagonal)
        b = _noise_moment(F, v, m) if inverse_free and whitening else _contract(B, m, diagonal)
        if inverse_free or diagonal:
            gradient = a - b
        else:
            gradient = (a - b).triu()
        norm = (a + b).amax(-1) if diagonal else _norm(a + b, "trace" if single else bound)
        size, new[f"L{m}"] = rate(Q[f"L{m}"], norm, gradient)
        size = size.view(-1, *[1] * (F.dim() - 1))
        if diagonal:
            change = gradient * F
        elif not inverse_free and _few(A, F):
            change = _triangle_times(A, B, m, F)
        else:
            change = gradient @ F
        moved = F - size * change
        new[str(m)] = _towards_symmetric(moved) if inverse_free and not diagonal else moved
    return _balanced(new, old) if len(made) > 1 and count % _BALANCE == _BALANCE - 1 else new


def _modes(Q: Sequence[Tensor | None], X: Tensor, *, transpose: bool = False) -> Tensor:
    """Every factor on its mode of (m, b, ...)."""
    return mode_products(Q, X.movedim(0, -1), transpose=transpose).movedim(-1, 0)


def _inverse_transposed(Q: Sequence[Tensor | None], X: Tensor) -> Tensor:
    """Q^-T by mode, by substitution."""
    for mode, F in enumerate(Q, start=2):
        if F is None:
            continue
        moved = X.movedim((1, mode), (0, 1))  # (b, n_m, ...)
        flat = moved.reshape(*moved.shape[:2], -1)
        flat = flat / F.unsqueeze(-1) if F.dim() == 2 else torch.linalg.solve_triangular(F.mT, flat, upper=False)
        X = flat.reshape(moved.shape).movedim((0, 1), (1, mode))
    return X


def _unfolded(X: Tensor, mode: int) -> Tensor:
    """X_(mode), (b, n_m, columns), the columns of all pairs."""
    return X.movedim((1, mode + 2), (0, 1)).flatten(2)


def _few(X: Tensor, F: Tensor) -> bool:
    """Whether columns one by one cost less than a product of matrices. Their sums on a GPU, by `cumsum`, are refused in torch's deterministic mode."""
    return _FEW * X[:, 0].numel() <= F.shape[-1] ** 2 and not (F.is_cuda and torch.are_deterministic_algorithms_enabled())


def _triangle_times(A: Tensor, B: Tensor, mode: int, F: Tensor) -> Tensor:
    """triu(<A A^T> - <B B^T>) F of few columns, in n^2 each: row i of triu(x x^T) F is x_i times the sum over k >= i of x_k F_k."""
    total = torch.zeros_like(F)
    for X, sign in ((A, 1.0), (B, -1.0)):
        for x in _unfolded(X, mode).unsqueeze(2).unbind(-1):
            total = total + sign * x * (x * F).flip(-2).cumsum(-2).flip(-2)
    return total / len(A)


def _contract(X: Tensor, mode: int, diagonal: bool) -> Tensor:
    """The mean over pairs of X_(mode) X_(mode)^T, (b, n_m, n_m), or its diagonal."""
    moved = _unfolded(X, mode)
    return (moved.square().sum(-1) if diagonal else moved @ moved.mT) / X.shape[0]


def _noise_moment(F: Tensor, v: Tensor, mode: int) -> Tensor:
    """What `_contract` of normal v is on average: the number of entries beside the mode, times I."""
    beside = math.prod(v.shape[2:]) / v.shape[mode + 2]
    ones = F.new_full(F.shape[:2], beside)
    return ones if F.dim() == 2 else torch.diag_embed(ones)


def _norm(S: Tensor, bound: Bound | Literal["trace"]) -> Tensor:
    """A bound of the spectral norm of semi-definite matrices (b, n, n).

    The trace from above, as published for a single mode; else |S x| / |x| from below. x is the column of the largest diagonal entry,
    never less than that entry; or S times the longest column, one power of S further.
    """
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    if bound == "trace":
        return diagonal.sum(-1)
    largest = diagonal.argmax(-1) if bound == "diagonal" else S.square().sum(-2).argmax(-1)
    x = S.gather(-1, largest.view(-1, 1, 1).expand(-1, S.shape[-1], 1))
    x = S @ x if bound == "column" else x
    size = x.norm(dim=(-2, -1))
    moved: Tensor = (S @ x).norm(dim=(-2, -1))
    return moved / torch.where(size > 0, size, 1.0)


def _towards_symmetric(Q: Tensor) -> Tensor:
    """One step of a rotation that brings Q nearer to a symmetric matrix: Q + a (R Q + a R R Q / 2), R = Q^T - Q of norm 1, a at most 1/8."""
    R = Q.mT - Q
    # R^T R is semi-definite; its largest eigenvalue is the square of R's norm
    size = _norm(R.mT @ R, "diagonal").sqrt()
    R = R / torch.where(size > 0, size, 1.0)[:, None, None]
    RQ = R @ Q
    RRQ = R @ RQ
    slope, bend = (X.diagonal(dim1=-2, dim2=-1).sum(-1) for X in (RQ, RRQ))
    a = torch.where(bend >= 0, 0.125, (-slope / torch.where(bend < 0, bend, -1.0)).clamp(max=0.125))[:, None, None]
    return Q + a * (RQ + a / 2 * RRQ)


def _balanced(Q: dict[str, Any], modes: Sequence[Tensor | None]) -> dict[str, Any]:
    """Factors whose largest entries are equal; their product is as it was."""
    kept = [m for m, F in enumerate(modes) if F is not None]
    sizes = torch.stack([Q[str(m)].abs().flatten(1).amax(-1) for m in kept])
    mean = sizes.log().mean(0).exp()
    return Q | {str(m): Q[str(m)] * (mean / size).view(-1, *[1] * (Q[str(m)].dim() - 1)) for m, size in zip(kept, sizes, strict=True)}
