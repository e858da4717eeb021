"""Claims about solvers.

The grid, solvers x structures x damping x powers, walks the registry: every cell equals the dense inverse power of the damped matrix to
1e-10, or is refused with the reason; `refused` states which by rules that do not look at the code. A solver with no row in `ROWS` fails a
test.

- Laws of every solver (identity 27): solve(M, M v + l v) == v; linear, symmetric and positive; columns equal single vectors; a zero
  right-hand side gives zero; 1x1 works; the state is read by torch.load(weights_only=True); applying a direct solver never waits for the
  device. Further laws: `test_solvers_laws.py`.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.errors import InvalidCombination, UnknownName
from precond.inversion import with_power
from precond.solvers import create, get, names
from solver_grid import DAMPINGS, DIRECT, EXACT, FOLLOWS, LEARNED, ROWS, STRUCTURES, cells, draw, eye, power_of, prepared, refused, taken


def test_every_solver_of_the_registry_has_a_row_in_the_grid() -> None:
    assert set(names()) == {*ROWS, *LEARNED}
    for name in ROWS:
        assert get(name).name == name and create(name) == create(get(name)) == get(name)()
    with pytest.raises(UnknownName, match="did you mean 'cholesky'"):
        create("cholesky_")


@pytest.mark.parametrize(("solver", "structure", "damping", "power"), cells())
def test_equals_the_dense_inverse_power_of_the_damped_matrix_or_is_refused(solver: str, structure: str, damping: str, power: float) -> None:
    C, rule = STRUCTURES[structure](), DAMPINGS[damping]
    why = refused(solver, structure, damping, power)
    if why is not None:
        with pytest.raises(InvalidCombination, match=why):
            with_power(get(solver), power).init(C, rule)
        return
    options = ROWS[solver][0] | ({"power": power} if power != 1 else {})
    made = get(solver)(**options)
    assert made.takes(C) and made.power == power
    state = made.init(C, rule)
    expected = power_of(rule(C, power).to_dense(), -power)
    P, _ = made.apply(state, eye(C.n), C)
    assert_close(P, expected, **EXACT)
    if damping != "none" and structure != "matrix_free":  # negative: the damping is there
        with pytest.raises(AssertionError):
            assert_close(P, power_of(C.to_dense(), -power), **EXACT)


@pytest.mark.parametrize(("solver", "structure"), taken())
def test_undoes_the_damped_product(solver: str, structure: str) -> None:
    made, C, state, M = prepared(solver, structure)
    v = draw(C.n, seed=4)
    assert_close(made.apply(state, M @ v, C)[0], v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "structure"), taken())
def test_is_linear_symmetric_and_positive_and_columns_equal_vectors(solver: str, structure: str) -> None:
    made, C, state, _ = prepared(solver, structure)
    V = draw(C.n, 3, seed=4)

    def P(v: Tensor) -> Tensor:
        return made.apply(state, v, C)[0]

    assert_close(P(V), torch.stack([P(v) for v in V.T], 1), **EXACT)
    assert_close(P(2 * V[:, 0] - V[:, 1]), 2 * P(V[:, 0]) - P(V[:, 1]), **EXACT)
    assert_close(V[:, 0] @ P(V[:, 1]), V[:, 1] @ P(V[:, 0]), **EXACT)
    assert (V * P(V)).sum(0).min() > 0
    assert_close(P(torch.zeros(C.n, dtype=torch.float64)), torch.zeros(C.n, dtype=torch.float64), rtol=0, atol=0)
    with pytest.raises(ValueError, match="takes a vector"):
        P(V[None])


@pytest.mark.parametrize(("solver", "structure"), taken())
def test_state_is_read_with_weights_only_and_apply_leaves_it_as_it_is(solver: str, structure: str) -> None:
    made, C, state, _ = prepared(solver, structure)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    v = draw(C.n)
    before = set(state)
    result, _ = made.apply(state, v, C)
    assert set(state) == before
    assert_close(made.apply(loaded, v, C)[0], result, rtol=0, atol=0)
    if solver not in FOLLOWS:
        assert_close(made.apply(made.refresh(state, C, made.natural_damping(type(C))(0.1)), v, C)[0], result, rtol=0, atol=0)


def to_meta(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: to_meta(value) for key, value in state.items()}
    return state.to("meta") if isinstance(state, Tensor) else state


@pytest.mark.parametrize(("solver", "structure"), [p for p in taken() if p.values[0] in DIRECT])
def test_applying_never_waits_for_the_device(solver: str, structure: str) -> None:
    made, C, state, _ = prepared(solver, structure)
    v = torch.empty(C.n, dtype=torch.float64, device="meta")  # reading a meta tensor on the host raises
    assert made.apply(to_meta(state), v)[0].shape == (C.n,)
