"""Random operators of every structure, and what every solver makes of each: the rows of the grid of `test_solvers.py`.

`refused` states by rules that do not look at the code which cells have no meaning. A solver with no row in `ROWS` fails a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from precond.damping import Damping, Factored, Outside, Tikhonov
from precond.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Gram,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    LowRank,
    MatrixFree,
    Operator,
    Probed,
    Repeated,
    Secant,
    SecantKronecker,
    SecantMemory,
    Sparse,
    SparsePrecision,
)
from precond.solvers import Solver, get

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
DIRECT = ("cholesky", "lu", "eigen", "elementwise", "smw", "sparse_cholesky", "newton_schulz", "qr_iteration")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(n, n, seed=seed))[0]


def conditioned(n: int, condition: float = 20.0, seed: int = 0) -> Tensor:
    """A definite matrix of this condition number."""
    U, d = basis(n, seed), torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    return (U * d) @ U.T


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def power_of(M: Tensor, p: float) -> Tensor:
    """By an eigendecomposition of the whole matrix, with no code of ours."""
    d, U = torch.linalg.eigh((M + M.T) / 2)
    return (U * d**p) @ U.T


def network(F: Tensor, parents: list[list[int]]) -> SparsePrecision:
    """Of one or two parents each, absent ones -1."""
    table = torch.tensor(parents)
    own = torch.cat([torch.arange(len(F)).unsqueeze(1), table.clamp(min=0)], 1)
    return SparsePrecision(F[own.unsqueeze(2), own.unsqueeze(1)], table)


def matrix_free() -> Operator:
    A = conditioned(5)
    return MatrixFree(lambda v: A @ v, 5, torch.float64, "cpu")


def rows_of(M: Tensor) -> Tensor:
    """U with U^T U = M."""
    U: Tensor = torch.linalg.cholesky(M).mT
    return U


STRUCTURES: dict[str, Callable[[], Operator]] = {
    "dense": lambda: Dense(conditioned(6)),
    "dense_1x1": lambda: Dense(torch.tensor([[2.0]], dtype=torch.float64)),
    "dense_stack": lambda: Dense(torch.stack([conditioned(3, seed=s) for s in range(4)])),
    "repeated": lambda: Repeated(Dense(conditioned(3)), 2),
    "secant": lambda: Secant(conditioned(5), draw(5), draw(5, seed=1)),
    "secant_kronecker": lambda: SecantKronecker(Secant(conditioned(3), draw(3), draw(3, seed=1)), Probed(conditioned(2), draw(2))),
    "secant_kronecker_memory": lambda: SecantKronecker(
        SecantMemory(draw(2, 3), draw(2, 3) @ conditioned(3), torch.tensor(2.0, dtype=torch.float64)), Probed(conditioned(2), draw(2))
    ),
    "secant_memory": lambda: SecantMemory(draw(2, 5), draw(2, 5) @ conditioned(5), torch.tensor(2.0, dtype=torch.float64)),
    "diagonal": lambda: Diagonal(conditioned(5).diagonal()),
    "kronecker": lambda: Kronecker(conditioned(3, seed=1), conditioned(2, seed=2)),
    "kronecker_three": lambda: Kronecker(conditioned(2, seed=1), conditioned(2, seed=2).diagonal(), conditioned(3, seed=3), scale=0.5),
    "kronecker_stack": lambda: Kronecker(torch.stack([conditioned(3, seed=s) for s in range(2)]), Diagonal(draw(2, 2).abs() + 0.2)),
    "kronecker_power": lambda: Kronecker(conditioned(3, seed=1), conditioned(2, seed=2), exponent=0.5, scale=torch.tensor(2.0).double()),
    "kronecker_rows": lambda: Kronecker(
        LowRank(torch.stack([rows_of(conditioned(3, seed=s)) for s in range(2)])),
        torch.stack([conditioned(2, seed=s) for s in (5, 6)]),
        scale=torch.tensor([0.5, 2.0]).double(),
    ),
    "kronecker_blocks": lambda: Kronecker(
        conditioned(2), BlockDiagonal({"a": Dense(conditioned(2, seed=1)), "b": Diagonal(conditioned(2, seed=2).diagonal())})
    ),
    "kronecker_eigen": lambda: KroneckerEigen((basis(2), basis(3)), draw(2, 3).abs() + 0.2),
    "kronecker_sum": lambda: KroneckerSum(Kronecker(conditioned(2, seed=1), conditioned(3, seed=2)), Kronecker(eye(2), conditioned(3))),
    "kronecker_axes": lambda: KroneckerSum(conditioned(3, seed=1), conditioned(2, seed=2).diagonal(), scale=0.5),
    "low_rank": lambda: LowRank(rows_of(conditioned(5))),
    "low_rank_stack": lambda: LowRank(torch.stack([rows_of(conditioned(3, seed=s)) for s in range(3)]), draw(3, 3).abs() + 0.5),
    "low_rank_eigen": lambda: LowRank(rows_of(conditioned(4))[:2]).spectral().map(lambda s: s + 0.1),
    "gram": lambda: Gram([(draw(8, 2, 2), draw(8, 2, 3, seed=1)), draw(8, 1, seed=2)]),
    "matrix_free": matrix_free,
    "sparse": lambda: Sparse(torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 2, 3]]), draw(5).abs() + torch.tensor([2.0, 0, 2, 1, 1]).double(), 4),
    "sparse_precision": lambda: network(conditioned(5), [[3, -1], [0, 3], [-1, -1], [-1, -1], [1, 2]]),
}
DAMPINGS: dict[str, Damping] = {"none": Tikhonov(0.0), "tikhonov": Tikhonov(0.1), "outside": Outside(0.1), "factored": Factored(0.1)}
DENSE = {"dense", "dense_1x1", "dense_stack", "repeated", "secant"}
KRONECKER = {"kronecker", "kronecker_three", "kronecker_stack", "kronecker_power", "kronecker_rows", "kronecker_blocks", "secant_kronecker"} | {
    "secant_kronecker_memory"
}
ROW_FORMS = {"low_rank", "low_rank_stack", "gram"}
ANY = {"dense", "dense_1x1", "matrix_free"}
KRYLOV = ANY | {"diagonal", "dense_stack", "kronecker", "kronecker_sum", "sparse"}
"""Both for solvers that see products only, as `cg` does, which is shown every structure: another one would show the same slower."""
FOLLOWS = {"bfgs", "newton_schulz", "qr_iteration"}
"""Solvers that go on from their state: the same operator twice is two steps."""
# name: (options, structures it takes, whether it has powers)
ROWS: dict[str, tuple[dict[str, Any], set[str], bool]] = {
    "cholesky": ({}, DENSE | KRONECKER, False),
    "lu": ({}, DENSE | KRONECKER, False),
    "eigen": (
        {},
        DENSE | KRONECKER | ROW_FORMS | {"diagonal", "kronecker_eigen", "kronecker_axes", "kronecker_sum", "low_rank_eigen"},
        True,
    ),
    "elementwise": ({}, {"diagonal", "kronecker_eigen", "low_rank_eigen"}, True),
    "smw": ({}, ROW_FORMS | KRONECKER, True),
    "bfgs": ({}, set(STRUCTURES), False),
    "sparse_cholesky": ({}, {"sparse_precision"}, False),
    "newton_schulz": ({"tolerance": 1e-13}, DENSE | KRONECKER, True),
    "qr_iteration": ({}, DENSE | KRONECKER, True),
    "cg": ({"tolerance": 1e-14}, set(STRUCTURES), False),
    "krylov": ({}, KRYLOV, True),
    "neumann": ({"terms": 320, "step_size": 1.7}, ANY, False),
    "heavy_ball": ({"iterations": 200}, ANY, False),
}


LEARNED = {"psgd", "riemannian"}
"""Solvers that come to the inverse over many refreshes, so that one of them equals nothing: `test_psgd.py`, `test_riemannian.py`."""


def refused(solver: str, structure: str, damping: str, power: float) -> str | None:
    """Why a cell has no meaning, or None."""
    _, takes, powers = ROWS[solver]
    if power != 1 and not powers:
        return "applies the power -1 only"
    if structure not in takes:
        return "cannot invert a"
    if damping == "factored" and structure not in DENSE | KRONECKER | {"diagonal"}:
        return "Factored damping needs Kronecker factors"
    if (solver, structure) == ("eigen", "kronecker_sum"):
        return "no eigendecomposition"
    if (
        solver == "krylov"
        and damping == "outside"
        and power != 1
        and structure in ("kronecker_sum", "matrix_free", "sparse", "sparse_precision")
    ):
        return "no eigendecomposition"
    if solver == "newton_schulz" and (
        (structure in KRONECKER and damping == "tikhonov") or (damping == "outside" and (power != 1 or structure in KRONECKER))
    ):
        return "Factored damping of a Kronecker"
    if solver == "bfgs" and structure in ("secant_kronecker", "secant_kronecker_memory") and damping in ("tikhonov", "outside"):  # its pair is that of a factor
        return "use Factored damping"
    if solver in ("cholesky", "lu", "smw") and structure in KRONECKER and (damping in ("tikhonov", "outside") or power != 1):
        return "use Factored damping"
    if solver == "sparse_cholesky" and damping in ("tikhonov", "outside"):
        return "use Blockwise damping"
    return None


def cells() -> list[Any]:
    return [
        pytest.param(solver, structure, damping, power, id=f"{solver}-{structure}-{damping}-{power}")
        for solver in ROWS
        for structure in STRUCTURES
        if ROWS[solver][1] not in (ANY, KRYLOV) or structure in ROWS[solver][1]
        for damping in DAMPINGS
        for power in (1.0, 0.5, 0.25)
        if power == 1 or ROWS[solver][2] or (structure, damping) == ("dense", "none")  # a power it has not is refused whatever it meets
    ]


def taken() -> list[Any]:
    cells = [(s, c) for s in ROWS for c in STRUCTURES if c in ROWS[s][1] and (s, c) != ("eigen", "kronecker_sum")]
    return [pytest.param(s, c, id=f"{s}-{c}") for s, c in cells]


def prepared(solver: str, structure: str, value: float = 0.1) -> tuple[Solver, Operator, dict[str, Any], Tensor]:
    """Solver, operator, state, and the damped matrix, with the damping natural to the cell."""
    made, C = get(solver)(**ROWS[solver][0]), STRUCTURES[structure]()
    rule = made.natural_damping(type(C))(value)
    return made, C, made.init(C, rule), rule(C).to_dense()
