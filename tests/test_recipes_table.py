"""The 29 methods of the table of Osawa et al. (ASDL, arXiv 2305.04684): each row is a recipe, as it stands or by overriding an axis.

- Every row is a triple of the table's matrix, granularity and solver; where the table and the paper differ, the recipe is the paper's and an override the
  table's. Both train for two steps.
- The overrides are not the recipe: another matrix makes another step. Where the table says that the Hessian's absolute value is held by elements, that
  is |diag H|.
- Rows that grow with every step are refused under a sum and held in a window.

Where a row and a recipe have different names for one thing: L-BFGS "matrix-free" is pairs (`full_low_rank`), from which no matrix is formed; KF-dim
of M-FAC and GGT "Gram" is `full_low_rank` or `full_gram`, which make the same steps; "F" of KFLR is the GGN, equal for the likelihoods of the table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from nets import labels, normal, seeded
from precond.history import Window

ROWS: dict[str, tuple[str, dict[str, Any], tuple[str, str, str]]] = {
    "LiSSA": ("lissa", {"repr": "full"}, ("hessian", "full", "neumann")),
    "LiSSA, by products": ("lissa", {}, ("hessian", "matrix_free", "neumann")),
    "PSGD": ("psgd", {}, ("abs_hessian", "full", "psgd")),
    "Neumann optimizer": ("neumann", {}, ("hessian", "matrix_free", "neumann")),
    "Hessian-free, H": ("hessian_free", {"matrix": "hessian"}, ("hessian", "matrix_free", "cg")),
    "Hessian-free, GN": ("hessian_free", {}, ("ggn", "matrix_free", "cg")),
    "KSD, H": ("ksd", {"matrix": "hessian"}, ("hessian", "matrix_free", "krylov")),
    "KSD, GN": ("ksd", {}, ("ggn", "matrix_free", "krylov")),
    "L-BFGS": ("lbfgs", {}, ("bfgs_hessian", "full_low_rank", "bfgs")),
    "SMW-GN": ("smw_gn", {}, ("ggn", "full_gram", "smw")),
    "SMW-NG": ("smw_ng", {}, ("empirical_fisher", "full_gram", "smw")),
    "TONGA": (
        "tonga", {"repr": "full_gram", "history": Window(5, reduction="sum", decay=0.995)}, ("empirical_fisher", "full_gram", "smw"),
    ),
    "TONGA, truncated": ("tonga", {}, ("empirical_fisher", "full_low_rank", "smw")),
    "M-FAC": ("mfac", {"repr": "full_gram"}, ("batched_empirical_fisher", "full_gram", "smw")),
    "M-FAC, in rows": ("mfac", {}, ("batched_empirical_fisher", "full_low_rank", "smw")),
    "GGT": ("ggt", {"repr": "full_gram"}, ("batched_empirical_fisher", "full_gram", "smw")),
    "GGT, in rows": ("ggt", {}, ("batched_empirical_fisher", "full_low_rank", "smw")),
    "FANG": ("fang", {}, ("fisher_mc", "full_sparse", "sparse_cholesky")),
    "PSGD (KF)": ("psgd_kron", {"repr": "kron_io"}, ("abs_hessian", "kron_io", "psgd")),
    "PSGD (KF), by dimensions": ("psgd_kron", {}, ("abs_hessian", "kron_dim", "psgd")),
    "K-BFGS": ("kbfgs", {}, ("bfgs_hessian", "kron_io", "bfgs")),
    "K-FAC, Fmc": ("kfac", {}, ("fisher_mc", "kron_io", "cholesky")),
    "K-FAC, Fe": ("kfac", {"matrix": "empirical_fisher"}, ("empirical_fisher", "kron_io", "cholesky")),
    "KFLR": ("kflr", {"matrix": "fisher"}, ("fisher", "kron_io", "cholesky")),
    "KFLR, GGN": ("kflr", {}, ("ggn", "kron_io", "cholesky")),
    "KFRA, Fmc": ("kfra", {"matrix": "fisher_mc"}, ("fisher_mc", "kron_io", "cholesky")),
    "KFRA, Fe": ("kfra", {"matrix": "empirical_fisher"}, ("empirical_fisher", "kron_io", "cholesky")),
    "KFRA, recursion": ("kfra", {}, ("ggn_recursive", "kron_io", "cholesky")),
    "EKFAC": ("ekfac", {}, ("empirical_fisher", "kron_eigen", "elementwise")),
    "SKFAC, F1mc": ("skfac", {}, ("fisher_mc", "kron_io", "smw")),
    "SKFAC, Fe": ("skfac", {"matrix": "empirical_fisher"}, ("empirical_fisher", "kron_io", "smw")),
    "SENG": ("seng", {}, ("empirical_fisher", "layer_gram", "smw")),
    "TNT, Fmc": ("tnt", {"matrix": "fisher_mc"}, ("fisher_mc", "kron_dim", "cholesky")),
    "TNT, Fe": ("tnt", {"matrix": "empirical_fisher"}, ("empirical_fisher", "kron_dim", "cholesky")),
    "TNT, of the mean": ("tnt", {}, ("batched_fisher_mc", "kron_dim", "cholesky")),
    "Shampoo": ("shampoo", {}, ("batched_empirical_fisher", "kron_dim", "eigen")),
    "unit-wise NG, Fmc": ("unit_wise_ng", {}, ("fisher_mc", "unit", "cholesky")),
    "unit-wise NG, Fe": ("unit_wise_ng", {"matrix": "empirical_fisher"}, ("empirical_fisher", "unit", "cholesky")),
    "TONGA (unit)": (
        "tonga_unit", {"repr": "unit_gram", "history": Window(5, reduction="sum", decay=0.995)}, ("empirical_fisher", "unit_gram", "smw"),
    ),
    "TONGA (unit), truncated": ("tonga_unit", {}, ("empirical_fisher", "unit_low_rank", "smw")),
    "AdaHessian": ("adahessian", {"matrix": "abs_hessian", "repr": "diagonal"}, ("abs_hessian", "diagonal", "elementwise")),
    "AdaHessian, |H v|": ("adahessian", {}, ("hessian", "diagonal", "elementwise")),
    "SFN": ("saddle_free_newton", {"repr": "diagonal", "solver": "elementwise"}, ("abs_hessian", "diagonal", "elementwise")),
    "SFN, Krylov": ("saddle_free_newton", {}, ("abs_hessian", "matrix_free", "krylov")),
    "Equilibrated SGD": ("equilibrated_sgd", {"matrix": "abs_hessian", "repr": "diagonal"}, ("abs_hessian", "diagonal", "elementwise")),
    "Equilibrated SGD, row norms": ("equilibrated_sgd", {}, ("hessian", "diagonal", "elementwise")),
    "AdaGrad": ("adagrad", {}, ("batched_empirical_fisher", "diagonal", "elementwise")),
    "Adam": ("adam", {}, ("batched_empirical_fisher", "diagonal", "elementwise")),
}  # fmt: skip

POWERS = {"Shampoo": 0.5, "AdaGrad": 0.5, "Adam": 0.5, "GGT": 0.5, "GGT, in rows": 0.5}
"""Of rows that invert the square root; the others, and the learned ones, invert the matrix."""


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))


def walked(row: str) -> Tensor:
    """(3, P): the start, and where two steps with the recipe's own optimizer lead."""
    recipe, overrides, triple = ROWS[row]
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = precond.load_recipe(recipe).optimizer(model.parameters())
    made = precond.recipe(recipe, seed=0, start_step=0, **overrides)
    assert (made.triple.matrix.name, made.triple.repr.name, made.triple.solver.name) == triple
    assert getattr(made.triple.solver, "power", 1.0) == POWERS.get(row, 1.0)
    path = [nn.utils.parameters_to_vector(model.parameters()).detach()]
    with made.attach(model, criterion, optimizer):
        for step in range(2):
            optimizer.zero_grad()
            criterion(model(normal(8, 2, seed=step)), labels(2, 8, seed=step)).backward()
            optimizer.step()
            path.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert made.diagnostics["refreshes"] > 0 and made.diagnostics["directions_zeroed"] == 0
    return torch.stack(path)


def test_the_table_is_whole() -> None:
    assert len({row.split(",")[0] for row in ROWS}) == 29
    assert len({recipe for recipe, _, _ in ROWS.values()}) == 29
    assert {recipe for recipe, _, _ in ROWS.values()} <= set(precond.recipes())


@pytest.mark.parametrize("row", ROWS)
def test_a_row_makes_two_steps(row: str) -> None:
    path = walked(row)
    assert path.isfinite().all()
    assert (path.diff(dim=0).norm(dim=1) > 1e-6).all()


@pytest.mark.parametrize(
    ("row", "other", "same"),
    [
        ("Hessian-free, H", "Hessian-free, GN", False),
        ("KSD, H", "KSD, GN", False),
        ("LiSSA", "LiSSA, by products", True),
        ("TONGA", "TONGA, truncated", True),
        ("M-FAC", "M-FAC, in rows", True),
        ("GGT", "GGT, in rows", True),
        ("K-FAC, Fmc", "K-FAC, Fe", False),
        ("KFLR", "KFLR, GGN", True),
        ("KFRA, Fe", "KFRA, recursion", False),
        ("SKFAC, F1mc", "SKFAC, Fe", False),
        ("TNT, Fe", "TNT, of the mean", False),
        ("unit-wise NG, Fmc", "unit-wise NG, Fe", False),
        ("TONGA (unit)", "TONGA (unit), truncated", True),
        ("AdaHessian", "AdaHessian, |H v|", False),
        ("SFN", "SFN, Krylov", False),
        ("Equilibrated SGD", "Equilibrated SGD, row norms", False),
        ("PSGD (KF)", "PSGD (KF), by dimensions", False),
    ],
)
def test_what_the_override_changes(row: str, other: str, same: bool) -> None:
    assert torch.allclose(walked(row), walked(other), rtol=1e-10, atol=1e-10) == same


def test_the_absolute_hessian_by_elements_is_that_of_its_diagonal() -> None:
    data = (net(), nn.CrossEntropyLoss(), normal(4, 2), labels(2, 4))
    held = precond.curvature(*data, matrix="abs_hessian", repr="diagonal").to_dense().diagonal()
    H = dense.hessian(*data)
    torch.testing.assert_close(held, H.diagonal().abs(), rtol=1e-10, atol=1e-10)
    assert (H.diagonal() < 0).any()


@pytest.mark.parametrize(("recipe", "repr"), [("tonga", "full_gram"), ("tonga_unit", "unit_gram")])
def test_rows_without_end_are_refused(recipe: str, repr: str) -> None:
    with pytest.raises(precond.InvalidCombination, match="Window"):
        precond.recipe(recipe, repr=repr)
