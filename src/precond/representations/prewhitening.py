"""Factors of a Kronecker covariance, each from gradients that the other factors have whitened."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from precond.errors import SolverFailure
from precond.numerics import eigh
from precond.operators import mode_products
from precond.representations.dimensions import FactorForm, contraction


def inverse_root(F: Tensor, form: FactorForm, damping: float) -> Tensor:
    """(F + damping I)^(-1/2) of stacks (b, n, n) or diagonals (b, n); I where F is zero, so that nothing is known yet, or has no decomposition."""
    if form == "diagonal":
        known, root, none = F.sum(-1, keepdim=True) > 0, (F.clamp(min=0) + damping).rsqrt(), torch.ones_like(F)
    else:
        none = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device).expand_as(F)
        try:
            d, U = eigh(F)
        except SolverFailure:  # any whitening gives factors; this one waits for better ones
            return none.clone()
        known = (F.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)[:, None, None]
        root = (U * (d.clamp(min=0) + damping).rsqrt().unsqueeze(-2)) @ U.mT
    return torch.where(known & root.isfinite(), root, none)


def whitened_contraction(tiles: Tensor, roots: Sequence[Tensor | None], mode: int, form: FactorForm) -> Tensor:
    """`contraction` of tiles (rows, b, n_1, ..., n_k) times the roots of all other modes, divided by prod_{j != mode} n_j."""
    others = [None if m == mode else root for m, root in enumerate(roots)]
    turned = mode_products(others, tiles.movedim(0, -1)).movedim(-1, 0)
    sizes = [n for m, n in enumerate(tiles.shape[2:]) if m != mode]
    return contraction(turned, mode, form) / torch.Size(sizes).numel()
