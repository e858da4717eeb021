"""Claims against scipy.sparse.linalg, in float64: iterates of CG, plain and preconditioned, and of MINRES; solutions; the largest eigenvalue."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import linalg as scipy
from torch import Tensor

from oracles.peers import close
from precond.damping import Tikhonov
from precond.lanczos import largest_eigenvalue
from precond.operators import Dense
from precond.solvers import CG, Jacobi, Krylov, Solver
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


def test_the_largest_eigenvalue() -> None:
    theirs = abs(scipy.eigsh(INDEFINITE.numpy(), k=1, return_eigenvectors=False)[0])
    close(float(largest_eigenvalue(lambda v: INDEFINITE @ v, B, N)), theirs)
    assert 0.95 * theirs < float(largest_eigenvalue(lambda v: INDEFINITE @ v, B, 8)) < 1.2 * theirs  # near before
