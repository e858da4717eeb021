"""The Lanczos process: eigenpairs of a symmetric operator and functions of it times a vector, from products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from precond.numerics import eigh, norm

Product = Callable[[Tensor], Tensor]


class Tridiagonal(NamedTuple):
    """C V = V T + rest v e_k^T with V (n, k) orthonormal; T has `diagonal` (k,) and `off` (k - 1,), and v is orthogonal to V."""

    basis: Tensor
    diagonal: Tensor
    off: Tensor
    rest: Tensor

    @property
    def dense(self) -> Tensor:
        """T, (k, k)."""
        return torch.diag(self.diagonal) + torch.diag(self.off, 1) + torch.diag(self.off, -1)


def tridiagonalise(product: Product, start: Tensor, steps: int, done: Callable[[Tridiagonal], bool] | None = None) -> Tridiagonal:
    """An orthonormal Krylov basis of `product` from `start` (n,), and what it makes of the operator.

    Every new vector is orthogonalised twice against all before, which keeps V orthonormal to rounding at a cost of 4 k n a step.
    Ends early where the Krylov space is invariant, k <= steps, and where `done` says so of what there is.
    """
    basis = [start / norm(start)]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    rest = scale = start.new_zeros(())
    for _ in range(min(steps, start.numel())):
        image = product(basis[-1])
        scale = torch.maximum(scale, norm(image))
        diagonal.append(basis[-1] @ image)
        V = torch.stack(basis, dim=1)
        for _ in range(2):
            image = image - V @ (V.T @ image)
        rest = norm(image)
        invariant = bool(rest <= 10 * torch.finfo(start.dtype).eps * scale * start.numel() ** 0.5)
        if len(diagonal) == min(steps, start.numel()) or invariant or (done is not None and done(_gathered(basis, diagonal, off, rest))):
            break
        off.append(rest)
        basis.append(image / rest)
    return _gathered(basis, diagonal, off, rest)


def _gathered(basis: list[Tensor], diagonal: list[Tensor], off: list[Tensor], rest: Tensor) -> Tridiagonal:
    V = torch.stack(basis[: len(diagonal)], dim=1)
    return Tridiagonal(V, torch.stack(diagonal), torch.stack(off) if off else rest.new_zeros(0), rest)


def function_times_vector(product: Product, f: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> Tensor:
    """f(C) v ~ |v| V f(T) e_1, f applied to eigenvalues; exact to rounding once k reaches the dimension of the Krylov space.

    Cost k products and 4 k^2 n. Source: Higham, "Functions of matrices", chapter 13.

    >>> C = torch.diag(torch.tensor([1.0, -2.0]))
    >>> function_times_vector(lambda v: C @ v, torch.abs, torch.ones(2), steps=2).round()
    tensor([1., 2.])
    """
    size = norm(vector)
    if not bool(size > 0):
        return torch.zeros_like(vector)
    found = tridiagonalise(product, vector, steps)
    result: Tensor = size * (found.basis @ first_column(found.dense, f))
    return result


def first_column(T: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f(T) e_1 for a symmetric `T` (k, k)."""
    values, vectors = eigh(T)
    return vectors @ (f(values) * vectors[0])


def largest_eigenvalue(product: Product, start: Tensor, steps: int) -> Tensor:
    """An estimate of the largest |eigenvalue|, 0-dim: the largest Ritz value plus the norm of its residual, exact once the space is invariant.

    `steps` products; never worse than as many of power iteration, whose vectors lie in the same Krylov space.

    >>> C = torch.diag(torch.tensor([1.0, -2.0]))
    >>> round(largest_eigenvalue(lambda v: C @ v, torch.ones(2), steps=2).item(), 4)
    2.0
    """
    found = tridiagonalise(product, start, steps)
    values, vectors = eigh(found.dense)
    return (values.abs() + found.rest * vectors[-1].abs()).amax()


def eigenpairs(product: Product, draw: Callable[[], Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values (k,) and orthonormal vectors (n, k) of a symmetric operator after at most `steps` products, k <= steps.

    They are eigenvalues and eigenvectors once k reaches the number of distinct eigenvalues; before, the outer ones are found first. A Krylov
    space holds one vector of each eigenspace, so that where it is exhausted the process goes on from a new start orthogonal to it, until
    that has the product zero: all that is left out then has eigenvalue zero. A product that is not finite makes all values NaN.

    draw: start vectors (n,), all the same on all ranks. Cost k products and 8 k^2 n. Sources: Lanczos 1950; Saad, "Numerical methods
    for large eigenvalue problems", chapter 6.

    >>> C = torch.diag(torch.tensor([2.0, 2.0, -3.0, 0.0]))
    >>> values, _ = eigenpairs(lambda v: C @ v, lambda: torch.randn(4), steps=4)
    >>> [round(v, 3) for v in values.tolist() if abs(v) > 1e-3]
    [-3.0, 2.0, 2.0]
    """
    start = draw()
    values, vectors = start.new_zeros(0), start.new_zeros(len(start), 0)
    left = min(steps, len(start))
    while left > 0:
        size = values.abs().amax() if len(values) else start.new_zeros(())
        found = tridiagonalise(_outside(vectors, product, size), _off(vectors, start), left)
        if not bool(found.dense.isfinite().all()):
            return found.diagonal * torch.nan, found.basis
        d, Z = eigh(found.dense)
        values, vectors = torch.cat([values, d]), torch.cat([vectors, found.basis @ Z], 1)
        if not bool((d != 0).any()):
            break
        left, start = left - len(d), draw()
    return values, vectors


def _off(V: Tensor, x: Tensor) -> Tensor:
    """The part of x (n,) orthogonal to the columns of V, to rounding."""
    for _ in range(2):
        x = x - V @ (V.T @ x)
    return x


def _outside(V: Tensor, product: Product, size: Tensor) -> Product:
    """The operator on vectors orthogonal to V, an invariant space; what is rounding beside eigenvalues of this size is zero."""

    def apply(x: Tensor) -> Tensor:
        image = _off(V, product(x))
        noise = 10 * torch.finfo(x.dtype).eps * size * len(x) ** 0.5
        return torch.where(image.norm() <= noise, 0.0, image)

    return apply
