"""Claims against scipy.sparse.linalg, in float64: iterates of CG, plain and preconditioned, and of MINRES; solutions; damped
least squares (LSMR); fractional powers; spectra; the largest eigenvalue."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import eigh, fractional_matrix_power
from scipy.sparse import linalg as scipy
from torch import Tensor

from oracles.peers import close
from precond.damping import Tikhonov
from precond.inversion import inverse
from precond.lanczos import largest_eigenvalue
from precond.operators import Dense, LowRank, MatrixFree
from precond.solvers import CG, Eigen, Jacobi, Krylov, Solver, create
from solver_grid import basis, conditioned, draw

N = 30
DEFINITE, B = conditioned(N, 1e3), draw(N)
INDEFINITE = (basis(N) * torch.linspace(-2, 3, N, dtype=torch.float64)) @ basis(N).T


def ours(solver: Solver, A: Tensor) -> np.ndarray:
    return solver.apply(solver.init(Dense(A), Tikhonov(0.0)), B)[0].numpy()


@pytest.mark.parametrize("iterations", [1, 5, 12])
@pytest.mark.parametrize("jacobi", [False, True])
def test_iterates_of_cg(iterations: int, jacobi: bool) -> None:
    M = np.diag(1 / DEFINITE.numpy().diagonal()) if jacobi else None
    theirs, _ = scipy.cg(DEFINITE.numpy(), B.numpy(), rtol=0, maxiter=iterations, M=M)
    close(ours(CG(max_iterations=iterations, tolerance=0, preconditioner=Jacobi(exponent=1.0) if jacobi else None), DEFINITE), theirs)


@pytest.mark.parametrize("iterations", [2, 5, 12])
def test_iterates_of_minres(iterations: int) -> None:
    seen: list[np.ndarray] = []
    scipy.minres(INDEFINITE.numpy(), B.numpy(), rtol=0, maxiter=iterations, callback=lambda x: seen.append(x.copy()))
    close(ours(Krylov(method="minres", steps=len(seen)), INDEFINITE), seen[-1])


def test_solutions() -> None:
    theirs, _ = scipy.minres(INDEFINITE.numpy(), B.numpy(), rtol=1e-14, maxiter=500)
    for method in ("minres", "lanczos"):
        torch.testing.assert_close(torch.as_tensor(ours(Krylov(method=method), INDEFINITE)), torch.as_tensor(theirs), rtol=1e-8, atol=1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["smw", "cholesky", "cg"])
def test_damped_least_squares_of_lsmr(solver: str) -> None:
    """The minimiser of |J x - r|^2 + l |x|^2 is (J^T J + l I)^-1 J^T r, by rows, by their matrix, by products alone."""
    J, r, damping = draw(12, N, seed=1), draw(12, seed=2), 0.3
    theirs = scipy.lsmr(J.numpy(), r.numpy(), damp=damping**0.5, atol=1e-14, btol=1e-14, maxiter=1000)[0]
    C = {"smw": LowRank(J), "cholesky": Dense(J.T @ J), "cg": MatrixFree(lambda v: J.T @ (J @ v), N, torch.float64, "cpu")}[solver]
    made = CG(tolerance=1e-14) if solver == "cg" else create(solver)
    close((inverse(C, solver=made, damping=damping) @ (J.T @ r)).numpy(), theirs)
    with pytest.raises(AssertionError):  # negative: another damping is another minimiser
        close((inverse(C, solver=made, damping=2 * damping) @ (J.T @ r)).numpy(), theirs)


@pytest.mark.parametrize("power", [1.0, 0.5, 1 / 6])
def test_powers_of_eigen_and_krylov(power: float) -> None:
    theirs = fractional_matrix_power(DEFINITE.numpy() + 0.1 * np.eye(N), -power) @ B.numpy()
    for made in (Eigen(power=power), Krylov(power=power)):
        close((inverse(Dense(DEFINITE), solver=made, damping=0.1) @ B).numpy(), theirs)


def test_spectra_of_eigen() -> None:
    theirs, vectors = eigh(INDEFINITE.numpy())
    spectral = Dense(INDEFINITE).spectral()
    close(np.sort(spectral.spectrum.flatten().numpy()), theirs)
    absolute = (vectors / (np.abs(theirs) + 0.1)) @ (vectors.T @ B.numpy())
    close((inverse(Dense(INDEFINITE), solver=Eigen(spectrum="abs"), damping=0.1) @ B).numpy(), absolute)
    largest = scipy.eigsh(INDEFINITE.numpy(), k=3, which="LA", return_eigenvectors=False)
    close(np.sort(spectral.spectrum.flatten().numpy())[-3:], np.sort(largest))


def test_the_largest_eigenvalue() -> None:
    theirs = abs(scipy.eigsh(INDEFINITE.numpy(), k=1, return_eigenvectors=False)[0])
    close(float(largest_eigenvalue(lambda v: INDEFINITE @ v, B, N)), theirs)
    assert 0.95 * theirs < float(largest_eigenvalue(lambda v: INDEFINITE @ v, B, 8)) < 1.2 * theirs  # near before
