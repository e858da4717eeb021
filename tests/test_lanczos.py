"""Claims about `precond.lanczos`: f(A) b from products, exact to 1e-10 wherever the Krylov space is exhausted.

- With as many steps as the dimension it is f(A) b by eigenvalues, for |x|, x, exp and 1/x, for a singular A too; with fewer it is not.
- The process ends early on an invariant subspace, after as many products as A has distinct eigenvalues with a share in b.
- A zero vector gives zero without a product; a zero matrix gives f(0) b; scaling b scales the result.
- The basis is orthonormal and carries A to the tridiagonal matrix; the vector and A are as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from nets import normal
from precond.lanczos import function_times_vector, tridiagonalise

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
Function = Callable[[Tensor], Tensor]


def symmetric(values: Tensor, seed: int = 7) -> Tensor:
    Q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    return (Q * values) @ Q.T


def by_eigenvalues(A: Tensor, f: Function, b: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return vectors @ (f(values) * (vectors.T @ b))


class Counted:
    def __init__(self, A: Tensor) -> None:
        self.A, self.products = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.A @ v


N = 24
SPECTRA = {
    "indefinite": torch.linspace(-2, 3, N, dtype=torch.float64),
    "singular": torch.cat([torch.zeros(9, dtype=torch.float64), torch.linspace(-1, 1, N - 9, dtype=torch.float64)]),
    "graded": torch.logspace(-12, 2, N, dtype=torch.float64) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(N // 2),
}


@pytest.mark.parametrize("f", [torch.abs, torch.exp, lambda x: x, torch.square], ids=["abs", "exp", "identity", "square"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_is_exact_at_the_full_dimension(spectrum: str, f: Function) -> None:
    """Beside the size of the largest entry: exp(100) b is compared in units of itself."""
    A, b = symmetric(SPECTRA[spectrum]), normal(N)
    want = by_eigenvalues(A, f, b)
    size = want.abs().max().clamp(min=1.0)
    close(function_times_vector(lambda v: A @ v, f, b, N) / size, want / size)


def test_it_inverts() -> None:
    A, b = symmetric(torch.linspace(1, 5, N, dtype=torch.float64)), normal(N)
    close(function_times_vector(lambda v: A @ v, torch.reciprocal, b, N), torch.linalg.solve(A, b))


def test_more_steps_than_dimensions_change_nothing_and_fewer_are_not_exact() -> None:
    A, b = symmetric(SPECTRA["indefinite"]), normal(N)
    want, errors = by_eigenvalues(A, torch.abs, b), []
    close(function_times_vector(lambda v: A @ v, torch.abs, b, 10 * N), want)
    for steps in (2, 8, 16):
        errors.append((function_times_vector(lambda v: A @ v, torch.abs, b, steps) - want).norm() / want.norm())
    assert errors[0] > errors[1] > errors[2] > 1e-6


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_it_ends_when_the_krylov_space_is_invariant(distinct: int) -> None:
    values = torch.linspace(-1, 2, distinct, dtype=torch.float64).repeat(N // distinct + 1)[:N]
    A, b = Counted(symmetric(values)), normal(N)
    close(function_times_vector(A, torch.abs, b, N), by_eigenvalues(A.A, torch.abs, b))
    assert A.products == distinct


def test_only_eigenvectors_with_a_share_in_the_vector_count() -> None:
    values = torch.linspace(-1, 2, N, dtype=torch.float64)
    matrix = symmetric(values)
    A, vectors = Counted(matrix), torch.linalg.eigh(matrix).eigenvectors
    b = vectors[:, 0] + 2 * vectors[:, 5]
    close(function_times_vector(A, torch.abs, b, N), values[0].abs() * vectors[:, 0] + 2 * values[5].abs() * vectors[:, 5])
    assert A.products == 2


def test_a_zero_vector_gives_zero_without_a_product() -> None:
    A = Counted(symmetric(SPECTRA["indefinite"]))
    assert not function_times_vector(A, torch.exp, torch.zeros(N, dtype=torch.float64), N).any()
    assert A.products == 0


def test_a_zero_matrix_gives_the_function_at_zero() -> None:
    b = normal(N)
    close(function_times_vector(torch.zeros_like, torch.exp, b, N), b)
    assert not function_times_vector(torch.zeros_like, torch.abs, b, N).any()


@pytest.mark.parametrize("size", [1e-150, 1e-6, 1e6, 1e150])
def test_it_is_linear_in_the_size_of_the_vector_and_of_the_matrix(size: float) -> None:
    A, b = symmetric(SPECTRA["singular"]), normal(N)
    want = by_eigenvalues(A, torch.abs, b)
    close(function_times_vector(lambda v: A @ v, torch.abs, size * b, N) / size, want)
    close(function_times_vector(lambda v: size * (A @ v), torch.abs, b, N) / size, want)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_basis_is_orthonormal_and_tridiagonalises(spectrum: str) -> None:
    A, b = symmetric(SPECTRA[spectrum]), normal(N)
    before = b.clone()
    V, diagonal, off, _ = tridiagonalise(lambda v: A @ v, b, N)
    k = V.shape[1]
    assert diagonal.shape == (k,) and off.shape == (k - 1,) and torch.equal(b, before)
    close(V.T @ V, torch.eye(k, dtype=torch.float64))
    close(V.T @ A @ V, diagonal.diag() + off.diag(1) + off.diag(-1))
    close(V[:, 0], b / b.norm())
