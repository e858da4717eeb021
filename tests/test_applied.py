"""Claims about how a factorised matrix is applied, by `cholesky` and `lu`.

- "solve", "inverse" and "auto" give the dense inverse of the damped matrix, all of them, before and after the inverse is formed.
- "auto" forms the inverse of a matrix once it has been applied to `break_even` times its rows of columns since its refresh, factor by factor;
  a refresh starts again. The number of factorisations, solves and inversions is counted, not their time.
- The choice is in the state: a state read from a file goes on with it, and a direction does not depend on what was asked before.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from precond.damping import Tikhonov
from precond.operators import BlockDiagonal, Dense, Diagonal, Kronecker
from precond.solvers import LU, Cholesky
from solver_grid import DENSE, EXACT, KRONECKER, STRUCTURES, conditioned, draw, eye
from training import batches, make, net, plain, sgd, theta

SOLVERS = pytest.mark.parametrize("solver", [Cholesky, LU])


@SOLVERS
@pytest.mark.parametrize("applied", ["auto", "solve", "inverse"])
@pytest.mark.parametrize("name", sorted(DENSE | KRONECKER))
def test_each_way_gives_the_dense_inverse_again_and_again(solver: Any, applied: Any, name: str) -> None:
    C, made = STRUCTURES[name](), solver(applied=applied)
    rule = made.natural_damping(type(C))(0.1)
    state, V = made.init(C, rule), draw(C.n, 2)
    expected = torch.linalg.inv(rule(C).to_dense())
    for _ in range(4):
        X, state = made.apply(state, V)
        assert_close(X, expected @ V, **EXACT)
    with pytest.raises(AssertionError):  # negative: damped it is
        assert_close(X, torch.linalg.inv(C.to_dense()) @ V, **EXACT)


def forms(state: dict[str, Any]) -> list[str]:
    """How each factor is held."""
    nodes = state["factors"].values() if "factors" in state else [state]
    return ["inverse" if "inverse" in node else "factor" for node in nodes]


@pytest.mark.parametrize(("solver", "columns"), [(Cholesky, 4), (LU, 8)])
def test_the_inverse_of_a_matrix_is_formed_when_it_has_been_applied_often_enough(solver: Any, columns: int) -> None:
    made, C = solver(), Dense(conditioned(8))
    state = made.init(C, Tikhonov(0.1))
    for k in range(1, columns + 2):
        _, state = made.apply(state, draw(8, seed=k))
        assert forms(state) == (["factor"] if k < columns else ["inverse"])
    assert forms(made.refresh(state, C, Tikhonov(0.1))) == ["factor"]  # and all is as it was
    assert forms(made.apply(made.init(C, Tikhonov(0.1)), draw(8, columns))[1]) == ["inverse"]  # at once, where there are so many columns
    for applied, form in (("solve", "factor"), ("inverse", "inverse")):
        other = solver(applied=applied)
        state = other.init(C, Tikhonov(0.1))
        assert forms(state) == [form] and forms(other.apply(state, draw(8, 20))[1]) == [form]


def test_each_factor_is_applied_by_its_own_cost() -> None:
    """K-FAC's of a layer (2, 8): A (8, 8) has 2 columns a step, B (2, 2) has 8."""
    made, C = Cholesky(), Kronecker(conditioned(2), conditioned(8))
    state = made.init(C, made.natural_damping(Kronecker)(0.1))
    assert forms(state) == ["factor", "factor"]
    _, after = made.apply(state, draw(16))
    assert forms(after) == ["inverse", "factor"] and after["factors"]["1"]["columns"] == 2
    assert forms(state) == ["factor", "factor"]  # what was given is not changed
    assert forms(made.apply(after, draw(16))[1]) == ["inverse", "inverse"]
    blocks = Kronecker(BlockDiagonal({"a": Dense(eye(1)), "b": Dense(eye(1))}), Diagonal(torch.ones(8).double()))
    assert forms(made.init(blocks, Tikhonov(0.0))) == ["inverse", "inverse"]  # what has no single factor


def test_what_is_done_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("_factorise", "_invert", "_solve"):
        old = getattr(Cholesky, name)

        def noted(self: Cholesky, *args: Any, name: str = name, old: Any = old) -> Any:
            done.append(name)
            return old(self, *args)

        monkeypatch.setattr(Cholesky, name, noted)
    C = Kronecker(conditioned(2), conditioned(8))
    for applied, expected in (
        ("auto", ["_factorise"] * 2 + ["_invert", "_solve", "_invert"]),
        ("solve", ["_factorise"] * 2 + ["_solve"] * 6),
        ("inverse", ["_factorise", "_invert"] * 2),
    ):
        done.clear()
        made: Any = Cholesky(applied=applied)  # type: ignore[arg-type]
        state = made.init(C, made.natural_damping(Kronecker)(0.1))
        for _ in range(3):
            _, state = made.apply(state, draw(16))
        assert done == expected


@SOLVERS
def test_the_choice_goes_on_from_a_file(solver: Any) -> None:
    made, C = solver(), Kronecker(conditioned(3), conditioned(4))
    state, found = made.init(C, made.natural_damping(Kronecker)(0.1)), list[Tensor]()
    for k in range(4):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        X, state = made.apply(torch.load(file, weights_only=True), draw(12, seed=k))
        found.append(X)
    state = made.init(C, made.natural_damping(Kronecker)(0.1))
    for k in range(4):
        X, state = made.apply(state, draw(12, seed=k))
        assert torch.equal(X, found[k])


@pytest.mark.parametrize("repr", ["layer", "kron_io"])
def test_training_is_the_same_whichever_way(repr: str) -> None:
    after = []
    for applied in ("auto", "solve", "inverse"):
        model, criterion = net(), nn.CrossEntropyLoss()
        preconditioner = make("ggn", repr, Cholesky(applied=applied), history=0.9, solver_interval=3).attach(model, criterion, optimizer := sgd(model))  # type: ignore[arg-type]
        for x, y in batches(6):
            plain(model, criterion, optimizer, x, y)
        after.append(theta(model))
        assert preconditioner.diagnostics["refreshes"] == 4
    assert_close(after[1], after[0], **EXACT)
    assert_close(after[2], after[0], **EXACT)


@SOLVERS
def test_the_option_is_checked(solver: Any) -> None:
    with pytest.raises(ValueError, match="choose 'auto', by cost, 'solve' or 'inverse'"):
        solver(applied="product")
