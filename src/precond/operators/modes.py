"""Products along the modes of a tensor: how a Kronecker product is applied without being formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mode_products(factors: Sequence[Tensor | None], X: Tensor, *, transpose: bool = False) -> Tensor:
    """X x_1 F_1 x_2 ... x_k F_k, batched: (F_1 (x) ... (x) F_k) vec(X) for row-major vec.

    Args:
        factors: per mode a stack of matrices (b, n_m, n_m), of diagonals (b, n_m), or None, the identity.
        X: (b, n_1, ..., n_k, c), with c columns.
        transpose: apply F_m^T instead.

    Costs b c prod(n) sum(n_m); for one matrix W (out, in) it is B W A^T.
    """
    shape = X.shape
    equation = "bji,bpjq->bpiq" if transpose else "bij,bpjq->bpiq"
    for mode, F in enumerate(factors, start=1):
        if F is None:
            continue
        before = shape[1:mode].numel()
        Y = X.reshape(shape[0], before, shape[mode], -1)  # every other mode is an index beside
        if F.dim() == 2:
            X = Y * F[:, None, :, None]
        elif Y.shape[-1] == 1:  # the last mode of a single column: one product of matrices, without moving a dimension
            X = torch.matmul(Y.squeeze(-1), F if transpose else F.mT)
        elif before == 1:
            X = torch.matmul(F.mT if transpose else F, Y.squeeze(1))
        else:
            X = torch.einsum(equation, F, Y)
    return X.reshape(shape)


def mode_product(product: Callable[[Tensor], Tensor], X: Tensor, mode: int) -> Tensor:
    """X x_m F for an F that is a function of columns (b n_m, k): every dimension of X (b, n_1, ..., n_k, c) but b and n_m is a column."""
    moved = X.movedim(mode, 1)
    return product(moved.reshape(moved.shape[:2].numel(), -1)).reshape(moved.shape).movedim(1, mode)


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """v_1 (x) ... (x) v_k kept as a tensor: vectors (b, n_m) -> (b, n_1, ..., n_k).

    >>> outer([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])])
    tensor([[[ 3.,  5.],
             [ 6., 10.]]])
    """
    result = vectors[0]
    for v in vectors[1:]:
        result = result.unsqueeze(-1) * v.reshape(v.shape[0], *[1] * (result.dim() - 1), v.shape[1])
    return result
