"""Kronecker eigenbases: how one is made and renewed, and how a spectrum is carried from the old one to the new."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from precond.blocks import Block
from precond.errors import SolverFailure
from precond.numerics import eigh
from precond.observe import Columns
from precond.operators import mode_products
from precond.orthogonal import advance, signed
from precond.representations.base import weighted_gradients, zeros
from precond.representations.unshared import unshared_rows

Bases = Sequence[Tensor | None]
"""One stack (b, n_m, n_m) a mode, basis vectors in columns; None is the identity."""
Group = tuple[Bases, tuple[int, ...]]
"""Bases, and the shape (b, n_1, ..., n_k) of the coordinates that have them; a vector is group after group."""


def first_basis(F: Tensor) -> Tensor:
    """The eigenvectors of `F` (b, n, n), each with its largest entry positive; the identity where no decomposition is found.

    Any orthogonal basis gives a valid operator, so that a failure costs accuracy and not the step.
    """
    try:
        return signed(eigh(F)[1])
    except SolverFailure:
        return torch.eye(F.shape[-1], dtype=F.dtype, device=F.device).expand_as(F).clone()


def diagonalise(F: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors U of `F`, and the squared overlaps (U^T old)^2; the old basis where no decomposition is found.

    A spectrum s in the old basis has the diagonal (U^T old)^2 s in the new one, which keeps its sum.
    """
    try:
        U = signed(eigh(F)[1])
    except SolverFailure:
        U = old
    return U, (U.mT @ old).square()


def iterate(F: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration: the columns of `old` in descending order of diag(old^T F old), Q <- qr(F Q); and that permutation.

    Costs one product and one QR; converges to the eigenvectors of a fixed `F`. A spectrum follows the permutation alone (Vyas et al. 2024).
    """
    image = F @ old
    U, order = advance(image, (image * old).sum(-2))
    return U, one_hot(order, F.shape[-1]).to(F.dtype)


RENEW = {"eigh": diagonalise, "qr": iterate}


def carry(spectrum: Tensor, changes: Bases, shape: Sequence[int]) -> Tensor:
    """A spectrum (*, n), n = prod(shape), times one matrix a mode: (b, n_m, n_m), or None where the mode keeps its basis."""
    columns = spectrum.reshape(-1, *shape).movedim(0, -1)
    return mode_products(changes, columns).movedim(-1, 0).reshape(spectrum.shape)


def rotated(bases: Bases, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Vectors (m, n) in block coordinates -> their coordinates in the basis, (m, n)."""
    columns = mode_products(bases, rows.T.reshape(*shape, -1), transpose=True)
    return columns.reshape(rows.shape[1], -1).T


def turned(groups: Sequence[Group], rows: Tensor) -> Tensor:
    """Vectors (m, n) in block coordinates -> their coordinates in the bases of all groups, (m, n)."""
    parts = rows.split([math.prod(shape) for _, shape in groups], -1)
    found = [rotated(bases, part, shape) for (bases, shape), part in zip(groups, parts, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def second_moments(observation: Columns, block: Block, groups: Sequence[Group]) -> Tensor:
    """The diagonal of U^T C U, (n,): scale * sum_ik (U^T u_ik)^2, exact with shared positions too."""
    bases, shape = groups[0]
    unshared = unshared_rows(observation, block) if len(groups) == 1 and len(shape) == 3 and shape[0] == 1 else None
    if unshared is not None and all(shape[1:] == (g.shape[1], a.shape[1]) for g, a in unshared):
        left, right = (U if U is None else U[0] for U in bases)  # (g a^T) in the basis is (U_1^T g) (U_2^T a)^T
        return torch.stack([(_turned(g, left).square().T @ _turned(a, right).square()).flatten() for g, a in unshared]).sum(0)
    total = zeros(block, block.n)
    for rows in weighted_gradients(observation, block):
        total = total + turned(groups, rows).square().sum(0)
    return total


def _turned(rows: Tensor, U: Tensor | None) -> Tensor:
    return rows if U is None else rows @ U
