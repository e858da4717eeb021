"""Claims about secant pairs, the two forms of the BFGS update, and the solver that follows the inverse.

- Identity 11: B s = y after a pair; B is symmetric, and positive definite iff s^T y > 0; the inverse form is the inverse of the direct one; on a
  quadratic with exact line search n steps give B = H.
- Powell's rules bring s^T y to mu times the curvature; a pair of none changes nothing; all of it in stacks as in loops.
- `bfgs` starts from the exact inverse of the damped operator, keeps H (y + damping s) = s, and learns A^-1 along probes.
- Pairs survive damping, casting and packing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dense_secant as loops
from precond.damping import Factored, Outside, Tikhonov
from precond.errors import InvalidCombination, SolverFailure
from precond.operators import Kronecker, Probed, Secant, SecantKronecker, pack, unpack
from precond.secant import PairRule, update_direct, update_inverse
from precond.solvers import BFGS

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
EYE = torch.eye(5, dtype=torch.float64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(n: int = 5, seed: int = 0) -> Tensor:
    root = normal(n, n, seed=seed)
    return root @ root.T / n + torch.eye(n, dtype=torch.float64)


def test_the_update_satisfies_its_pair_and_its_inverse_is_the_inverse_form() -> None:
    B, s, y = spd(), normal(5, seed=1), normal(5, seed=2)
    y = y if s @ y > 0 else -y
    new = update_direct(B, s, y)
    close(new @ s, y)
    close(new, new.T)
    close(torch.linalg.inv(new), update_inverse(torch.linalg.inv(B), s, y))
    assert torch.linalg.eigvalsh(new)[0] > 0
    assert torch.linalg.eigvalsh(update_direct(B, s, -y))[0] < 0  # without curvature along s there is no positive definite B


def test_exact_line_searches_on_a_quadratic_end_at_its_hessian() -> None:
    H, B, x = spd(seed=3), EYE.clone(), normal(5, seed=4)
    for _ in range(5):
        g = H @ x
        d = -torch.linalg.solve(B, g)
        s = -(g @ d) / (d @ H @ d) * d
        B = PairRule(powell=0.0).direct(B, s, H @ s, torch.tensor(False))[0]
        x = x + s
    torch.testing.assert_close(B, H, rtol=1e-8, atol=1e-8)  # n steps of a recursion that divides by small numbers
    assert (PairRule(powell=0.0).direct(EYE, s, H @ s, torch.tensor(False))[0] - H).norm() > 1e-2


@pytest.mark.parametrize("mu", [0.2, 0.7])
def test_powell_brings_the_curvature_to_mu(mu: float) -> None:
    B, s, y = spd(), normal(5, seed=1), normal(5, seed=2)
    y = y if s @ y < 0 else -y
    new, counts = PairRule(powell=mu).direct(B, s, y, torch.tensor(False))
    assert bool(counts)
    close(s @ new @ s, mu * (s @ B @ s))
    H = torch.linalg.inv(B)
    new, counts = PairRule(powell=mu).inverse(H, s, y, torch.tensor(False))
    close(y @ new @ y, mu * (y @ H @ y))
    assert torch.linalg.eigvalsh(new)[0] > 0
    same, counts = PairRule(powell=0.0).direct(B, s, y, torch.tensor(False))
    assert not bool(counts)
    assert torch.equal(same, B)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"powell": 0.0}, {"second": "mix", "amount": 0.5}, {"second": "add", "amount": 0.5}, {"scale_initial": True}, {"skip": 0.3},
        {"powell_on": "inverse"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", ["direct", "inverse"])
def test_stacks_are_loops(options: dict[str, Any], form: str) -> None:
    S, Y, B = normal(8, 5, seed=5), normal(8, 5, seed=6), torch.stack([spd(seed=k) for k in range(8)])
    first = torch.arange(8) % 2 == 0
    got, counts = getattr(PairRule(**options), form)(B, S, Y, first)
    for k in range(8):
        expected, counted = getattr(loops, form)(B[k], S[k], Y[k], loops.Rule(**options), bool(first[k]))
        close(got[k], expected)
        assert bool(counts[k]) == counted
    if options.get("powell") == 0.0:
        assert not counts.all()
        assert counts.any()


def test_nothing_to_learn_changes_nothing_and_gives_no_nan() -> None:
    zero = torch.zeros(5, dtype=torch.float64)
    for s, y in ((zero, zero), (zero, zero + 1), (zero + 1, zero), (zero + torch.nan, zero + 1)):
        for form in ("direct", "inverse"):
            same, counts = getattr(PairRule(powell=0.0), form)(EYE, s, y, torch.tensor(True))
            assert torch.equal(same, EYE)
            assert not bool(counts)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_bfgs_starts_exact_and_then_keeps_the_damped_pair(damping: float) -> None:
    B, s, y = spd(), normal(5, seed=1), spd(seed=8) @ normal(5, seed=1)
    solver, v = BFGS(), normal(5, seed=9)
    state = solver.init(Secant(B, 0 * s, 0 * s), Tikhonov(damping))
    close(solver.apply(state, v)[0], torch.linalg.solve(B + damping * EYE, v))
    new = PairRule().direct(B, s, y, torch.tensor(False))[0]
    state = solver.refresh(state, Secant(new, s, y), Tikhonov(damping))
    close(solver.apply(state, y + damping * s)[0], s)
    exact = torch.linalg.solve(new + damping * EYE, v)
    if damping == 0.0:
        close(solver.apply(state, v)[0], exact)
    else:  # a damped pair is no damped matrix: they agree along the pair only
        assert (solver.apply(state, v)[0] - exact).norm() > 1e-3 * exact.norm()
    assert solver.apply(solver.refresh(state, Secant(new, 0 * s, 0 * s), Tikhonov(damping)), v)[0].equal(solver.apply(state, v)[0])


def test_probes_drive_the_inverse_to_that_of_the_factor() -> None:
    A, B, solver = spd(4, seed=2), Secant(EYE, EYE[0] * 0, EYE[0] * 0), BFGS()
    state = solver.init(SecantKronecker(B, Probed(torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))), Factored(0.0))
    errors, probed = [], True
    for k in range(60):
        along = state["factors"]["1"]["inverse"] @ normal(4, seed=k)
        state = solver.refresh(state, SecantKronecker(B, Probed(A, normal(4, seed=k))), Factored(0.0))
        probed &= torch.allclose(state["factors"]["1"]["inverse"] @ A @ along, along, rtol=1e-10)
        errors.append((state["factors"]["1"]["inverse"] - torch.linalg.inv(A)).norm())
    assert probed  # H A v = v along the last probe
    assert errors[0] > 0.1
    assert errors[-1] < 1e-6
    V = normal(20, seed=3)
    close(solver.apply(state, V)[0], Kronecker(EYE, state["factors"]["1"]["inverse"]) @ V)


def test_pairs_survive_damping_casting_and_packing() -> None:
    rule = PairRule(second="add", amount=0.5)
    C = SecantKronecker(Secant(spd(), EYE[0], EYE[1], rule), Probed(spd(3), torch.ones(3, dtype=torch.float64)))
    for again in (unpack(pack(C)), C.to(dtype=torch.float64)):
        close(again.to_dense(), C.to_dense())
        assert again.factors[0].rule == rule
        assert again.factors[1].probe.equal(C.factors[1].probe)  # type: ignore[union-attr]
    damped = Factored(0.25, pi=False)(C)
    close(damped.factors[0].y, EYE[1] + 0.5 * EYE[0])
    close(damped.factors[0].matrix, spd() + 0.5 * EYE)


def test_what_has_no_meaning_is_refused() -> None:
    s = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(SolverFailure, match="not positive definite"):
        BFGS().init(Secant(-EYE, s, s), Tikhonov(0.0))
    with pytest.raises(SolverFailure, match="scale 0"):
        BFGS().init(Kronecker(EYE, EYE, scale=0.0), Tikhonov(0.0))
    with pytest.raises(InvalidCombination, match="not factor-wise"):
        BFGS().init(SecantKronecker(Secant(EYE, s, s), Probed(EYE, s)), Outside(0.1))
    with pytest.raises(ValueError, match="the pair of matrices"):
        Secant(EYE, s[:2], s[:2])
    with pytest.raises(ValueError, match="the probe of matrices"):
        Probed(EYE, s[:2])
    with pytest.raises(ValueError, match="needs a factor that is a Secant"):
        SecantKronecker(EYE, EYE)
