"""Claims about Martens' preconditioner of conjugate gradients: a diagonal that is measured beside the products of a matrix-free operator.

- It is the mean of the squared per-example gradients of the dense oracle, whatever the matrix of the products; plus the damping, to the power -3/4, it is the
  preconditioner, so that the direction after a few iterations is that of preconditioned conjugate gradients by hand, and not that of others.
- Micro-batches, a resumed run and other matrices of columns are right as well; two ranks: `test_ddp.py`. A matrix without columns is refused at construction.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import precond
from precond.errors import InvalidCombination
from precond.representations import MatrixFree
from precond.solvers import CG, Jacobi
from test_cg import cg_by_hand
from training import EXACT, LR, accumulate, batches, gradient, make, net, plain, sgd, theta

CRITERION = nn.CrossEntropyLoss()
ORACLES = {"ggn": dense.ggn, "empirical_fisher": dense.empirical_fisher, "hessian": dense.hessian}


def expected(matrix: str, diagonal: str | None, damping: float, iterations: int) -> Tensor:
    model, (x, y) = net(), batches(1)[0]
    C, g = ORACLES[matrix](model, CRITERION, x, y), gradient(model, x, y)
    M = C + damping * torch.eye(len(C), dtype=C.dtype)
    d = torch.ones_like(g) if diagonal is None else ORACLES[diagonal](model, CRITERION, x, y).diagonal() + damping
    return theta(net()) - LR * cg_by_hand(M, g, torch.diag(d**-0.75), iterations)[-1]


def moved(matrix: str, diagonal: str | None, damping: float, iterations: int, loop: Any = plain, preconditioner: Any = "jacobi") -> Tensor:
    model = net()
    solver = CG(max_iterations=iterations, tolerance=0.0, preconditioner=preconditioner)
    make(matrix, MatrixFree(diagonal=diagonal), solver, damping).attach(model, CRITERION, optimizer := sgd(model))
    loop(model, CRITERION, optimizer, *batches(1)[0])
    return theta(model)


@pytest.mark.parametrize(("matrix", "diagonal", "damping"), [("ggn", "empirical_fisher", 0.1), ("hessian", "empirical_fisher", 1.0), ("ggn", "ggn", 0.1)])
@pytest.mark.parametrize("loop", [plain, accumulate(2, 4)], ids=["whole", "micro"])
def test_a_few_iterations_are_those_of_cg_with_the_dense_diagonal(matrix: str, diagonal: str, damping: float, loop: Any) -> None:
    found = moved(matrix, diagonal, damping, 4, loop)
    assert_close(found, expected(matrix, diagonal, damping, 4), **EXACT)
    for other in ({"ggn", "empirical_fisher"} - {diagonal}) | {None}:  # negative: the diagonal matters
        assert (found - expected(matrix, other, damping, 4)).norm() > 1e-5


def test_it_costs_no_product_and_probes_do() -> None:
    asked = []
    C = precond.operators.MatrixFree(lambda v: asked.append(v) or 2 * v, 3, torch.float64, "cpu", torch.tensor([1.0, 4.0, 16.0]).double())
    d = Jacobi(exponent=0.5)(precond.damping.Tikhonov(0.0)(C)).diagonal()
    assert_close(d, torch.tensor([1.0, 0.5, 0.25]).double(), **EXACT)
    assert not asked
    assert_close(C.diagonal(), torch.full((3,), 2.0).double(), **EXACT)  # that of the operator is its own


def test_training_with_it_goes_on_from_a_checkpoint() -> None:
    paths = []
    for interrupted in (False, True):
        def built() -> precond.Preconditioner:
            return make("ggn", MatrixFree(diagonal="empirical_fisher"), CG(preconditioner="jacobi", warm_start=0.9, max_iterations=5), 0.1)

        model, preconditioner = net(), built()
        preconditioner.attach(model, CRITERION, optimizer := sgd(model))
        for step, (x, y) in enumerate(batches(5)):
            plain(model, CRITERION, optimizer, x, y)
            if interrupted and step == 2:
                state = preconditioner.state_dict()
                preconditioner.remove()
                preconditioner = built()
                preconditioner.attach(model, CRITERION, optimizer).load_state_dict(state)
        paths.append(theta(model))
    assert torch.equal(*paths)


def test_a_matrix_without_columns_is_refused_at_construction() -> None:
    with pytest.raises(InvalidCombination, match="told to measure the matrix 'hessian' by columns"):
        make("ggn", MatrixFree(diagonal="hessian"), "cg", 0.1)
    with pytest.raises(precond.UnknownName, match="empirical_fisher"):
        make("ggn", MatrixFree(diagonal="empirical"), "cg", 0.1)
