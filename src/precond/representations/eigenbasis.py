"""Kronecker eigenbases: how one is made and renewed, and how a spectrum is carried from the old one to the new."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from precond.blocks import Block
from precond.errors import SolverFailure
from precond.numerics import eigh
from precond.observe import Columns
from precond.operators import mode_products
from precond.representations.base import weighted_gradients, zeros
from precond.representations.unshared import unshared_rows

Bases = Sequence[Tensor | None]
"""One stack (b, n_m, n_m) a mode, basis vectors in columns; None is the identity."""


def first_basis(F: Tensor) -> Tensor:
    """The eigenvectors of `F` (b, n, n), each with its largest entry positive; the identity where no decomposition is found.

    Any orthogonal basis gives a valid operator, so that a failure costs accuracy and not the step.
    """
    try:
        return _signed(eigh(F)[1])
    except SolverFailure:
        return torch.eye(F.shape[-1], dtype=F.dtype, device=F.device).expand_as(F).clone()


def diagonalise(F: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors U of `F`, and the squared overlaps (U^T old)^2; the old basis where no decomposition is found.

    A spectrum s in the old basis has the diagonal (U^T old)^2 s in the new one, which keeps its sum.
    """
    try:
        U = _signed(eigh(F)[1])
    except SolverFailure:
        U = old
    return U, (U.mT @ old).square()


def iterate(F: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration: the columns of `old` in descending order of diag(old^T F old), Q <- qr(F Q); and that permutation.

    Costs two products and one QR; converges to the eigenvectors of a fixed `F`. A spectrum follows the permutation alone (Vyas et al. 2024).
    """
    order = ((F @ old) * old).sum(-2).argsort(dim=-1, descending=True, stable=True)
    Q = old.gather(-1, order.unsqueeze(-2).expand_as(old))
    return _signed(torch.linalg.qr(F @ Q).Q), one_hot(order, F.shape[-1]).to(F.dtype)


RENEW = {"eigh": diagonalise, "qr": iterate}


def carry(spectrum: Tensor, changes: Bases, shape: Sequence[int]) -> Tensor:
    """A spectrum (*, n), n = prod(shape), times one matrix a mode: (b, n_m, n_m), or None where the mode keeps its basis."""
    columns = spectrum.reshape(-1, *shape).movedim(0, -1)
    return mode_products(changes, columns).movedim(-1, 0).reshape(spectrum.shape)


def rotated(bases: Bases, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Vectors (m, n) in block coordinates -> their coordinates in the basis, (m, n)."""
    columns = mode_products(bases, rows.T.reshape(*shape, -1), transpose=True)
    return columns.reshape(rows.shape[1], -1).T


def second_moments(observation: Columns, block: Block, bases: Bases, shape: Sequence[int]) -> Tensor:
    """The diagonal of U^T C U, (n,): scale * sum_ik (U^T u_ik)^2, exact with shared positions too."""
    unshared = unshared_rows(observation, block) if len(shape) == 3 and shape[0] == 1 else None
    if unshared is not None:  # (g a^T) in the basis is (U_1^T g) (U_2^T a)^T
        left, right = (U if U is None else U[0] for U in bases)
        return torch.stack([(_turned(g, left).square().T @ _turned(a, right).square()).flatten() for g, a in unshared]).sum(0)
    total = zeros(block, block.n)
    for rows in weighted_gradients(observation, block):
        total = total + rotated(bases, rows, shape).square().sum(0)
    return total


def contraction(rows: Tensor, shape: Sequence[int], mode: int) -> Tensor:
    """The sum over rows (m, n) of G_(mode) G_(mode)^T, of the unfoldings of tensors of `shape`."""
    unfolded = rows.reshape(-1, *shape).movedim(mode + 1, 0).reshape(shape[mode], -1)
    return unfolded @ unfolded.T


def _turned(rows: Tensor, U: Tensor | None) -> Tensor:
    return rows if U is None else rows @ U


def _signed(U: Tensor) -> Tensor:
    """Columns with their largest entry positive, so that a basis does not depend on the signs a library leaves."""
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    return U * torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
