"""The Lanczos process: a function of a symmetric operator times a vector, from products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from precond.numerics import eigh


def tridiagonalise(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal Krylov basis V (n, k) of `product` from `start` (n,), and T = V^T C V: its diagonal (k,) and off-diagonal (k - 1,).

    Every new vector is orthogonalised twice against all before, which keeps V orthonormal to rounding at a cost of 4 k n a step.
    Ends early where the Krylov space is invariant: k <= steps.
    """
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    scale = start.new_zeros(())
    for _ in range(min(steps, start.numel())):
        image = product(basis[-1])
        scale = torch.maximum(scale, image.norm())
        diagonal.append(basis[-1] @ image)
        V = torch.stack(basis, dim=1)
        for _ in range(2):
            image = image - V @ (V.T @ image)
        size = image.norm()
        if len(diagonal) == min(steps, start.numel()) or bool(size <= 10 * torch.finfo(start.dtype).eps * scale * start.numel() ** 0.5):
            break
        off.append(size)
        basis.append(image / size)
    return torch.stack(basis[: len(diagonal)], dim=1), torch.stack(diagonal), torch.stack(off) if off else start.new_zeros(0)


def function_times_vector(product: Callable[[Tensor], Tensor], f: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> Tensor:
    """f(C) v ~ |v| V f(T) e_1, f applied to eigenvalues; exact to rounding once k reaches the dimension of the Krylov space.

    Cost k products and 4 k^2 n. Source: Higham, "Functions of matrices", chapter 13.

    >>> C = torch.diag(torch.tensor([1.0, -2.0]))
    >>> function_times_vector(lambda v: C @ v, torch.abs, torch.ones(2), steps=2).round()
    tensor([1., 2.])
    """
    size = vector.norm()
    if not bool(size > 0):
        return torch.zeros_like(vector)
    V, diagonal, off = tridiagonalise(product, vector, steps)
    T = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = eigh(T)
    result: Tensor = size * (V @ (vectors @ (f(values) * vectors[0])))
    return result
