"""What a solver that fits pairs makes of an operator: the structure to fit, and pairs (v, C v) by products with random v."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from precond.operators import (
    Absolute,
    Dense,
    Diagonal,
    Fit,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    Operator,
    RootShifted,
    Shifted,
)
from precond.operators.pairs import ModeForm

Structure = Literal["natural", "dense", "diagonal", "low_rank"]


def fit_of(operator: Operator, structure: Structure, rank: int) -> Fit:
    """The structure of what is fitted to an operator.

    "natural" is the operator's own: dense for a matrix or a stack of them, diagonal, one factor a mode for a Kronecker form, and for all else
    diagonal plus low rank, or dense where that has no more numbers. Stacks are fitted matrix by matrix.

    >>> fit_of(Kronecker(torch.eye(2), torch.ones(3)), "natural", 10)
    Fit(sizes=(2, 3), forms=('dense', 'diagonal'), batch=1, rank=None)
    """
    if isinstance(operator, (Absolute, Shifted, RootShifted)):
        return fit_of(operator.operator, structure, rank)
    batch, size = operator.batch.numel(), operator.size
    if structure == "diagonal" or (structure == "natural" and isinstance(operator, Diagonal)):
        return Fit((operator.n,), ("diagonal",))
    modes = _modes(operator) if structure == "natural" else None
    if modes is not None and "dense" not in modes[1]:
        return Fit((operator.n,), ("diagonal",))
    if modes is not None:
        return Fit(*modes)
    small = 2 * rank + 1 >= size
    if structure == "dense" or (structure == "natural" and (isinstance(operator, Dense) or batch > 1 or small)):
        return Fit((size,), ("dense",), batch=batch)
    return Fit((operator.n,), ("diagonal",), rank=min(rank, operator.n))


def _modes(operator: Operator) -> tuple[tuple[int, ...], tuple[ModeForm, ...], int] | None:
    """Sizes and forms of the modes of a Kronecker form, and its batch."""
    if isinstance(operator, KroneckerSum):
        parts = [_modes(term) for term in operator.terms]
        sizes, _, batch = parts[0] or ((), (), 1)
        columns = zip(*(part[1] for part in parts if part is not None), strict=True)
        return sizes, tuple("diagonal" if set(column) == {"diagonal"} else "dense" for column in columns), batch
    if isinstance(operator, KroneckerEigen):
        batch, *lengths = operator.spectrum.shape
        return tuple(lengths), tuple("diagonal" if U is None else "dense" for U in operator.bases), batch
    if isinstance(operator, Kronecker):
        forms: tuple[ModeForm, ...] = tuple("diagonal" if isinstance(F, Diagonal) else "dense" for F in operator.factors)
        return operator.sizes, forms, operator.batch.numel()
    return None


def probed(operator: Operator, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(v, C v), each (count, n): v normal, or for count >= n the n multiples sqrt(n) of unit vectors, whose mean of v v^T is I itself."""
    n = operator.n
    if count < n:
        v = torch.randn(count, n, generator=generator, dtype=operator.dtype).to(operator.device)
    else:
        v = n**0.5 * torch.eye(n, dtype=operator.dtype, device=operator.device)
    return v, (operator @ v.mT).mT
