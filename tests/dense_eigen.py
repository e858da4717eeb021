"""The Kronecker eigenbasis with an exact diagonal, densely: U = U_1 (x) ... (x) U_k as one matrix, and plain loops over its columns.

Claims (methods C.6, F.16, F.33; `F` is the exact block in the order in which its Kronecker factors multiply):

* the corrected block is U diag(S) U^T with S_j = u_j^T F u_j, u_j the columns of U, U_m the eigenvectors of factor m;
* a spectrum that is kept while the basis changes is, afresh, the diagonal of the matrix that it stood for;
* orthogonal iteration sorts the columns by their Rayleigh quotients, largest first, and takes the Q of F Q; the spectrum is sorted alike.

Where a factor is degenerate its basis is not unique: compare matrices, on data for which the null spaces of the factors are those of F.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def basis(factors: list[Tensor]) -> Tensor:
    """(n, n): the Kronecker product of the eigenvectors of the factors, in columns."""
    return reduce(torch.kron, [torch.linalg.eigh(F)[1].contiguous() for F in factors])


def spectrum(U: Tensor, F: Tensor) -> Tensor:
    """u^T F u of every column u."""
    return torch.stack([u @ F @ u for u in U.T])


def matrix(U: Tensor, S: Tensor) -> Tensor:
    """U diag(S) U^T."""
    return sum(s * torch.outer(u, u) for s, u in zip(S, U.T, strict=True))


def corrected(factors: list[Tensor], F: Tensor) -> Tensor:
    """F with its off-diagonal entries in the joint eigenbasis of the factors left out."""
    U = basis(factors)
    return matrix(U, spectrum(U, F))


def groups(pairs: list[tuple[Tensor, Tensor]], F: Tensor) -> Tensor:
    """`corrected` of each pair of factors on its own block on the diagonal of F, one after another."""
    blocks, start = [], 0
    for pair in pairs:
        end = start + len(pair[0]) * len(pair[1])
        blocks.append(corrected(list(pair), F[start:end, start:end]))
        start = end
    return torch.block_diag(*blocks)


def iterate(F: Tensor, Q: Tensor) -> tuple[Tensor, list[int]]:
    """(the new basis, the order in which the old columns were taken)."""
    quotients = [float(q @ F @ q) for q in Q.T]
    order = sorted(range(len(quotients)), key=lambda j: -quotients[j])
    return torch.linalg.qr(F @ Q[:, order])[0], order
