"""The cells matrix x representation that have a meaning, by the registries; and what tests need to know of a matrix to walk them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from dense_cells import ALL
from nets import normal
from precond import cells, matrices, representations
from precond.matrices import AbsHessian
from precond.solvers import CG

CHAINS = ("mlp", "mse", "mse_sum", "bce")
"""The cases that are a chain of linear and element-wise layers: `ggn_recursive` refuses all others."""
SAMPLED = ("fisher_mc", "batched_fisher_mc")
LEFT = "ignore:layer .* keeps its plain gradient:UserWarning"
"""What `input_second_moment` says of layers that have no inputs of its kind."""


def valid(matrix: str, repr: str) -> bool:
    """CG takes any operator, so that the solver is no reason."""
    return cells.why_not(matrices.get(matrix)(), representations.get(repr)(), CG()) is None


TRAJECTORY = tuple(m for m in matrices.names() if matrices.get(m)().needs_trajectory)
"""Matrices that have no value from one batch."""
OF_A_BATCH = tuple(m for m in matrices.names() if m not in TRAJECTORY)
PAIRS = [(m, r) for m in OF_A_BATCH for r in representations.names() if valid(m, r)]


def hosts(case: str, matrix: str) -> bool:
    """Whether there is such a matrix of a case."""
    return matrix != "ggn_recursive" or case in CHAINS


def everyday(case: str, matrix: str, repr: str) -> bool:
    """Whether a cell of the grid runs every day; the others are marked slow.

    Every cell on the smallest net; on every net each matrix in the forms that project nothing away, and each other representation with one
    matrix in turn, another one on the next net.
    """
    if case == "mlp" or repr in ("full", "layer", "matrix_free"):
        return True
    names, hosted = list(ALL), [m for m, r in PAIRS if r == repr and hosts(case, m)]
    return matrix == hosted[(names.index(case) + representations.names().index(repr)) % len(hosted)]


def grid(cases: Iterable[str], cells: Iterable[tuple[str, str]]) -> list[Any]:
    """Parameters (case, matrix, repr) for all cells that there are."""
    found = [(case, m, r) for case in cases for m, r in cells if hosts(case, m)]
    return [pytest.param(*cell, marks=() if everyday(*cell) else pytest.mark.slow) for cell in found]


def exactly(matrix: Any, repr: Any, model: torch.nn.Module) -> Any:
    """The matrix; for products of |H| with as many Lanczos steps as there are parameters."""
    if matrix == "abs_hessian" and repr == "matrix_free":
        return AbsHessian(steps=sum(p.numel() for p in model.parameters() if p.requires_grad))
    return matrix


def entries(C: Any, matrix: Any, repr: Any) -> Tensor:
    """The dense matrix; of |H| as products, which take a Lanczos process each, three products."""
    if (matrix, repr) == ("abs_hessian", "matrix_free"):
        return torch.stack([C @ normal(C.shape[0], seed=seed) for seed in range(3)])
    dense: Tensor = C.to_dense()
    return dense
