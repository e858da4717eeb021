"""Orthogonal iteration: an eigenbasis that follows a matrix that moves, by one product and one QR factorisation a step."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.numerics import symmetrise


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


def off_diagonal(F: Tensor, values: Tensor) -> Tensor:
    """|B - diag(B)| / |B| of B = Q^T F Q in Frobenius norms, (...,), from diag(B) alone, as |B| = |F|; good to the root of the rounding.

    >>> off_diagonal(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([2.0, 2.0])).square()
    tensor(0.2000)
    """
    whole = F.square().sum((-2, -1))
    return (1 - values.square().sum(-1) / torch.where(whole > 0, whole, 1.0)).clamp(min=0).sqrt() * (whole > 0)


def follow(F: Tensor, Q: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """A basis close to the eigenvectors of `F` (..., n, n) from an old one, diag(Q^T F Q) in it, and the steps taken.

    Stops where `off_diagonal` is at most `tolerance` in every matrix, or after `steps`. One product, and a product and a QR a step.
    """
    F = symmetrise(F)
    for step in range(steps + 1):
        image = F @ Q
        values = (Q * image).sum(-2)
        if step == steps or bool((off_diagonal(F, values) <= tolerance).all()):
            break
        Q, _ = advance(image, values)
    return Q, values, step
