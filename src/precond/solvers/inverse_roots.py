"""Inverse roots of definite matrices by products alone."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.errors import SolverFailure
from precond.numerics import ROUNDING, symmetric_product, symmetrise, transposed

Coefficients = tuple[float, float, float]
MUON: Coefficients = (3.4445, -4.7750, 2.0315)
"""a, b, c of the odd quintic that sends every singular value from about 1e-3 to 1 close to 1 in five steps (Jordan et al. 2024)."""

QUADRATIC = 1e-2
"""Below this distance from the identity an iteration that does not halve it has met rounding."""


def coupled_newton(A: Tensor, root: int, iterations: int, tolerance: float) -> tuple[Tensor, int]:
    """A^(-1/root) of definite `A` (..., n, n), and the iterations: X <- X T, M <- T^root M with T = ((root + 1) I - M) / root.

    From X = z^(1/root) I, M = z A, z = (1 + root) / (2 |A|_F); root + 1 products an iteration at most; M tends to I and A X^root = M.
    Sources: Guo and Higham 2006; Anil et al. (arXiv 2002.09018).

    Raises:
        SolverFailure: `A` is singular or indefinite to working precision, not finite, or needs more iterations.
    """
    A, eye = symmetrise(A), _identity(A)
    z = (1 + root) / (2 * torch.linalg.matrix_norm(A)[..., None, None])
    X, M = z ** (1 / root) * eye, z * A
    error, before = _distance(M, eye), float("inf")
    for done in range(iterations):  # noqa: B007  # the count is returned
        if error <= tolerance or not error < float("inf") or (error < QUADRATIC and error > before / 2):
            break
        T = ((root + 1) * eye - M) / root
        X, M = symmetrise(X @ T), symmetrise(torch.linalg.matrix_power(T, root) @ M)
        error, before = _distance(M, eye), error
    _check(A, X, root, error, tolerance)
    return X, done


def newton_inverse(A: Tensor, X: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, int] | None:
    """X and R = I - A X with A^-1 = X + X R, from a definite approximation of A^-1, and the iterations: X <- X + X R corrects its own errors.

    With e = |I - X^(1/2) A X^(1/2)|_F = tr(R^2)^(1/2): None where e is not below 1/2, which also shows `A` definite. An iteration makes R^2 of
    R (Schulz 1933), so e at most e^2: stops where e^2 <= tolerance |I|_F, and leaves the last iteration to who applies the result. One
    product, and 1.6 more an iteration, as X + X R is symmetric. Roots have no such iteration: theirs diverge from a start that does
    not commute with `A`, unless `A` is close to a multiple of I (Higham 2008, section 6.4).
    """
    A, eye = symmetrise(A), _identity(A)
    before, enough = float("inf"), tolerance * A.shape[-1] ** 0.5
    for done in range(iterations + 1):
        R = eye - A @ X
        error = float((R * transposed(R)).sum((-2, -1)).abs().amax().sqrt())
        if done == 0 and not error < 0.5:
            return None
        if error**2 <= enough or error > before / 2 or done == iterations:  # e^2 is at most e / 2: what does not halve it is rounding
            break
        X, before = X + symmetric_product(X, R), error
    return X, R, done


def quintic(A: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """About A^(-1/2) of semi-definite `A` (..., n, n): S <- q S, Y <- q^2 Y, q = a I + b Y + c Y^2, from Y = A / (|A^(1/2)|_F + 1e-7)^2.

    S G with A = G G^T is Muon's Newton-Schulz polar factor of G, X <- a X + (b Y + c Y^2) X with Y = X X^T: polynomials in A commute. On the
    null space of `A` it is a^steps / (|G|_F + 1e-7). Five products a step.
    """
    a, b, c = coefficients
    A, eye = symmetrise(A), _identity(A)
    size = A.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0).sqrt()[..., None, None] + 1e-7
    Y, S = A / size**2, eye / size
    for _ in range(steps):
        q = a * eye + b * Y + c * (Y @ Y)
        S, Y = symmetrise(q @ S), symmetrise(q @ Y @ q)
    return S


def _identity(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)


def _distance(M: Tensor, eye: Tensor) -> float:
    return float((M - eye).abs().amax())


def _check(A: Tensor, X: Tensor, root: int, error: float, tolerance: float) -> None:
    eps = torch.finfo(A.dtype).eps
    # at least 1 / (the condition number times n): where it is below rounding, an eigenvalue of noise was inverted
    conditioned = A.abs().amax((-2, -1)) * X.abs().amax((-2, -1)).pow(root) < 1 / (ROUNDING * eps)
    if not (error <= max(tolerance, eps**0.5) and bool(conditioned.all())):
        raise SolverFailure(
            f"the Newton iteration for the inverse root {root} of matrices {tuple(A.shape)} ended {error:.1e} from the identity: they are singular, "
            "indefinite or not finite to working precision; increase the damping, which must be positive."
        )
