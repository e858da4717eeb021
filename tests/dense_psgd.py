"""PSGD, INGD and IKFAC by whole matrices and loops, from the papers alone: one update of each.

A factor of PSGD is held as the dense Q of all modes; contractions are sums over explicit unfoldings, inverses `torch.linalg.inv`.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def kron(factors: list[Tensor]) -> Tensor:
    return reduce(torch.kron, [F.contiguous() for F in factors])


def unfolding(x: Tensor, sizes: tuple[int, ...], mode: int) -> Tensor:
    return x.reshape(sizes).movedim(mode, 0).reshape(sizes[mode], -1)


def contraction(X: Tensor, sizes: tuple[int, ...], mode: int) -> Tensor:
    """The mean over the pairs X (m, n)."""
    total = torch.zeros(sizes[mode], sizes[mode], dtype=X.dtype)
    for x in X:
        for column in unfolding(x, sizes, mode).T:
            total += torch.outer(column, column)
    return total / len(X)


def lower_bound(S: Tensor, column: bool = False) -> Tensor:
    """|S x| / |x| with x the column that has the largest diagonal entry; or x = S c, c the longest column."""
    x = S[:, S.diagonal().argmax()]
    if column:
        x = S @ S[:, torch.stack([c.norm() for c in S.T]).argmax()]
    return (S @ x).norm() / x.norm()


def rotated(Q: Tensor) -> Tensor:
    """One step of online orthogonal Procrustes."""
    R = Q.T - Q
    if not R.any():
        return Q
    R = R / lower_bound(R.T @ R).sqrt()
    bend, slope = torch.trace(R @ R @ Q), torch.trace(R @ Q)
    a = 0.125 if bend >= 0 else min(0.125, float(-slope / bend))
    return Q + a * (R @ Q + a / 2 * R @ R @ Q)


def modes(
    factors: list[Tensor], forms: tuple[str, ...], L: list[float], v: Tensor, h: Tensor, *, step: float, decay: float = 0.9, update: str = "EQ",
    whitening: bool = False, largest: bool = False, column: bool = False,
) -> tuple[list[Tensor], list[float]]:  # fmt: skip
    """(factors, L) after one update; every factor a matrix, that of a diagonal or an identity too."""
    sizes = tuple(F.shape[0] for F in factors)
    Q, free = kron(factors), update != "EQ"
    A = torch.stack([Q.T @ Q @ x if free else Q @ x for x in h])
    B = v if free else torch.stack([torch.linalg.inv(Q).T @ x for x in v])
    new, norms = [], []
    for m, (F, form) in enumerate(zip(factors, forms, strict=True)):
        if form == "identity":
            new.append(F)
            norms.append(0.0)
            continue
        a = contraction(A, sizes, m)
        others = Q.shape[0] / sizes[m]
        b = others * torch.eye(sizes[m], dtype=Q.dtype) if free and whitening else contraction(B, sizes, m)
        gradient = a - b
        if form == "diagonal":
            gradient, norm = gradient.diagonal().diag(), (a + b).diagonal().max()
        else:
            single = sum(f != "identity" for f in forms) == 1
            norm = torch.trace(a + b) if single and not free and not column else lower_bound(a + b, column)
            gradient = gradient if free else gradient.triu()
        size = float(gradient.abs().max()) if largest else max(decay * L[m] + (1 - decay) * float(norm), float(norm))
        moved = F - step / size * gradient @ F
        new.append(rotated(moved) if free and form == "dense" else moved)
        norms.append(size)
    return new, norms


def balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    rho = (U.norm() / V.norm()).sqrt()
    U, V = U / rho, rho * V
    E = 0.1 * (U.T @ U - V.T @ V) / (U.norm() ** 2 + V.norm() ** 2)
    return U - U @ (E - E @ E / 2), V + V @ (E + E @ E / 2)


def low_rank(U: Tensor, V: Tensor, d: Tensor, v: Tensor, h: Tensor, L: dict[str, float], *, step: float, U_moves: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(U, V, d) after one update from a single pair; L is changed."""
    U, V = balanced(U, V)
    Q = (torch.eye(len(d), dtype=d.dtype) + U @ V.T) @ d.diag()
    inverse = torch.linalg.inv(Q)
    a, b = Q @ h, inverse.T @ v
    Ph, Pv = Q.T @ a, inverse @ b

    def size(name: str, norm: Tensor) -> float:
        L[name] = max(0.9 * L[name] + 0.1 * float(norm), float(norm))
        return step / L[name]

    d = d - size("Ld", (h * Ph).abs().max() + (v * Pv).abs().max()) * (h * Ph - v * Pv) * d
    if U_moves:
        norm = a.norm() * (V @ V.T @ a).norm() + b.norm() * (V @ V.T @ b).norm()
        gradient = (torch.outer(a, V.T @ a) - torch.outer(b, V.T @ b)) @ (torch.eye(U.shape[1], dtype=d.dtype) + V.T @ U)
        return U - size("Lu", norm) * gradient, V, d
    norm = a.norm() * (U @ U.T @ a).norm() + b.norm() * (U @ U.T @ b).norm()
    gradient = torch.outer(a + V @ U.T @ a, U.T @ a) - torch.outer(b + V @ U.T @ b, U.T @ b)
    return U, V - size("Lv", norm) * gradient, d


def projected(M: Tensor, group: str, block: int) -> Tensor:
    """Entry by entry."""
    out = torch.zeros_like(M)
    for i in range(len(M)):
        for j in range(len(M)):
            if group == "dense" or (group == "diagonal" and i == j) or (group == "block" and i // block == j // block):
                out[i, j] = M[i, j]
            elif (group == "lower" and i >= j) or (group == "upper" and i <= j):
                out[i, j] = M[i, j] * (1 if i == j else 2)
    return out


def ingd(
    K: Tensor, C: Tensor, A: Tensor, B: Tensor, mK: Tensor, mC: Tensor, *, damping: float, step: float, momentum: float, group: str = "dense",
    block: int = 30,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(K, C, m_K, m_C) after one update: K K^T for A^-1, C C^T for B^-1."""
    dK, dC = len(K), len(C)
    HK, HC = K.T @ A @ K, C.T @ B @ C
    IK, IC = torch.eye(dK, dtype=K.dtype), torch.eye(dC, dtype=C.dtype)
    gK = 0.5 * (torch.trace(HC) / dC * HK + damping * torch.trace(C.T @ C) / dC * K.T @ K - IK)
    gC = 0.5 * (torch.trace(HK) / dK * HC + damping * torch.trace(K.T @ K) / dK * C.T @ C - IC)
    mK = momentum * mK + projected(gK, group, block)
    mC = momentum * mC + projected(gC, group, block)
    return K @ (IK - step * mK), C @ (IC - step * mC), mK, mC
