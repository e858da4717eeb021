"""An eigenbasis that follows a matrix that moves, by products and a QR factorisation a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from precond.numerics import symmetric_product, symmetrise, transposed

Error = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From a basis Q (..., n, n), d = diag(Q^T F Q) (..., n) and N = F Q - Q diag(d) to how far they are from what is wanted, (...,)."""

NEAR = 0.1
"""How much of the norm of a matrix may be off its diagonal for its eigenvectors to be those of the identity to first order."""


def signed(U: Tensor) -> Tensor:
    """Columns with their largest entry positive, so that a basis does not depend on the signs a library leaves."""
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    return U * torch.where(largest < 0, -1.0, 1.0).to(U.dtype)


def advance(image: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The next basis qr(F Q) and the order its columns come in, from `image` = F Q (..., n, n) and `values` = diag(Q^T F Q) (..., n).

    Columns are put in descending order of the values first (Vyas et al. 2024, SOAP), without which the iteration cannot exchange two.
    """
    order = values.argsort(dim=-1, descending=True, stable=True)
    ordered = image.gather(-1, order.unsqueeze(-2).expand_as(image))
    return signed(torch.linalg.qr(ordered).Q), order


def follow(F: Tensor, Q: Tensor, steps: int, tolerance: float, error: Error | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """A basis Q close to the eigenvectors of `F` (..., n, n) from an old one, d = diag(Q^T F Q), N = F Q - Q diag(d), and the steps taken.

    Stops where `error` is at most `tolerance` in every matrix, or after `steps`; the default is |N| / |F|, in Frobenius norms, which is what
    Q^T F Q has off its diagonal. A step is one of two:

    - Q <- qr(Q + Q W), all of Jacobi's rotations at once: eigenvectors to first order, so that N squares. For an N of at most `NEAR` |F|,
      and only where N has halved since the last such step;
    - Q <- qr(F Q) otherwise: orthogonal iteration, which comes from anywhere, at the rate of the ratio of neighbouring eigenvalues.

    One product, and 2.6 and a QR more a step.
    """
    F, Q = symmetrise(F), row_major(Q)
    size = torch.linalg.matrix_norm(F)
    limit = NEAR * size
    for step in range(steps + 1):
        image = F @ Q
        d = (Q * image).sum(-2)
        N = image.addcmul_(Q, d.unsqueeze(-2), value=-1)
        distance = torch.linalg.matrix_norm(N)
        far = distance / torch.where(size > 0, size, 1.0) if error is None else error(Q, d, N)
        if step == steps or bool((far <= tolerance).all()):
            break
        rotates = distance <= limit
        limit = torch.where(rotates, distance / 2, limit)
        columns = torch.where(rotates[..., None, None], Q + Q @ rotations(symmetric_product(Q, N), d), N + Q * d.unsqueeze(-2))
        Q = row_major(advance(columns, d)[0])
    return Q, d, N, step


def row_major(Q: Tensor) -> Tensor:
    """The same matrices laid out as products are: LAPACK's come in columns, which is many times slower where the two meet entry by entry."""
    return Q if Q.is_contiguous() else transposed(Q.mT).contiguous()


def rotations(E: Tensor, d: Tensor) -> Tensor:
    """W antisymmetric (..., n, n) with the tangents, at most 1, of the rotations that zero each entry of diag(d) + E off the diagonal, were it alone.

    >>> rotations(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([2.0, 2.0]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    gap = d.unsqueeze(-2) - d.unsqueeze(-1)
    index = torch.arange(d.shape[-1], device=d.device)
    side = torch.where(gap == 0, (index - index.unsqueeze(-1)).to(gap.dtype), gap).sign()  # equal ones: either, but opposite across the diagonal
    below = gap + side * torch.hypot(gap, 2 * E)
    return torch.where(below == 0, 0.0, 2 * E / torch.where(below == 0, 1.0, below))
