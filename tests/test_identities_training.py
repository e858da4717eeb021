"""Identities 30 and 31: what a step of training is equal to (float64), each with a case in which it is not.

- 30: `adagrad`, `rmsprop`, `adam` are torch's, parameter for parameter at 1e-12, and not with another eps; the full matrix with power 1/2
  and a sum is full-matrix AdaGrad; `kron_dim` with power 1/2 and a sum is Shampoo, `kron_io` with factored damping is K-FAC, written out.
- 31: a bias-corrected average of a constant is that constant from the first step, an uncorrected one is not; with intervals nothing
  of the state changes in between; a state that was saved and loaded goes on bit for bit.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import dense_kron
import precond
from nets import CASES, Case
from precond import history
from precond.damping import Factored

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
LR = 0.1


def apart(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * b.norm())


# -- 30 ----------------------------------------------------------------------------------------------------------------


def train(case: Case, outer: Callable[[Any], torch.optim.Optimizer], preconditioner: precond.Preconditioner | None = None) -> list[Tensor]:
    """The parameters after every step, on batches that differ."""
    model, criterion = case.make(), copy.deepcopy(case.criterion)
    optimizer, seen = outer(model.parameters()), []
    if preconditioner is not None:
        preconditioner.attach(model, criterion, optimizer)
    for step in range(5):
        optimizer.zero_grad()
        keep = slice(step % 2, len(case.inputs))
        criterion(model(case.inputs[keep]), case.targets[keep]).backward()
        optimizer.step()
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return seen


TORCH: dict[str, tuple[Any, dict[str, Any]]] = {
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01, "eps": 1e-10}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.99, "eps": 1e-8}),
    "adam": (torch.optim.Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}),
}


@pytest.mark.parametrize("name", ["mlp", "conv", "reused", "lstm"])
@pytest.mark.parametrize("recipe", TORCH)
def test_30_diagonal_recipes_are_torchs_optimizers(recipe: str, name: str) -> None:
    """Not on attention: the gradient of its key bias is 0 but for rounding, which these methods blow up to a step of its own."""
    kind, options = TORCH[recipe]
    want = train(CASES[name], partial(kind, **options))
    got = train(CASES[name], precond.load_recipe(recipe).optimizer, precond.recipe(recipe))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    other = train(CASES[name], partial(kind, **{**options, "eps": 1e-2}))
    assert (other[-1] - want[-1]).abs().max() > 1e-5


def written_out(case: Case, update: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """SGD along update(model, x, y), on the batches of `train`."""
    model, seen = case.make(), []
    for step in range(5):
        keep = slice(step % 2, len(case.inputs))
        direction = update(model, case.inputs[keep], case.targets[keep])
        with torch.no_grad():
            for p, part in zip(model.parameters(), direction.split([p.numel() for p in model.parameters()]), strict=True):
                p.sub_(LR * part.view(p.shape))
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return seen


def power(M: Tensor, p: float) -> Tensor:
    d, U = torch.linalg.eigh(M)
    return (U * d**p) @ U.T


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def half(repr: str) -> precond.Preconditioner:
    solver = precond.solvers.Eigen(power=0.5)
    return precond.Preconditioner(matrix="batched_empirical_fisher", repr=repr, solver=solver, damping=0.0, history=history.Sum(1e-2))


def test_30_the_full_matrix_with_a_sum_and_a_root_is_full_adagrad() -> None:
    case, S = CASES["mlp"], 1e-2 * torch.eye(64, dtype=torch.float64)

    def update(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        g = dense.gradient(model, case.criterion, x, y)
        S.add_(torch.outer(g, g))
        return power(S, -0.5) @ g

    want = written_out(case, update)
    close(train(case, sgd, half("full")), want)
    assert apart(train(case, sgd, half("diagonal"))[-1], want[-1])


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_30_kron_dim_with_a_sum_and_a_root_is_shampoo(name: str) -> None:
    case = CASES[name]
    factors = {n: [1e-2 * torch.eye(size, dtype=torch.float64) for size in p.shape] for n, p in case.make().named_parameters()}

    def update(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = []
        for name, G in dense.split(dense.gradient(model, case.criterion, x, y), model).items():
            D = G
            for m, F in enumerate(factors[name]):
                F.add_(dense_kron.kron_dim(G.unsqueeze(0))[m])
                D = torch.tensordot(power(F, -0.5 / G.dim()), D.movedim(m, 0), 1).movedim(0, m)
            found.append(D.flatten())
        return torch.cat(found)

    close(train(case, sgd, half("kron_dim")), written_out(case, update))


def kfac(beta: float, pi: bool = True) -> precond.Preconditioner:
    return precond.Preconditioner(matrix="ggn", repr="kron_io", solver="cholesky", damping=Factored(1e-2, pi=pi), history=beta)


def test_30_kron_io_with_factored_damping_is_kfac() -> None:
    case, beta, averages, count = CASES["mlp"], 0.9, {}, [0]

    def update(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        count[0] += 1
        here = Case("here", lambda: model, case.criterion, x, y)
        sent, g, found = (
            dense_cells.cotangents(here, "ggn"),
            dense.gradient(model, case.criterion, x, y),
            torch.zeros(64, dtype=torch.float64),
        )
        for layer, _ in dense.layer_groups(model):
            B, A = dense_kron.kron_expand(model, case.criterion, x, y, sent, layer)
            old = averages.get(layer, (0.0, 0.0))
            averages[layer] = tuple(beta * o + (1 - beta) * n for o, n in zip(old, (B, A), strict=True))
            B, A = (F / (1 - beta ** count[0]) for F in averages[layer])
            pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
            root, where = 1e-2**0.5, dense.joint_indices(model, layer)
            left, right = B + root / pi * torch.eye(len(B), dtype=B.dtype), A + pi * root * torch.eye(len(A), dtype=A.dtype)
            G = g[where].reshape(len(B), len(A))
            found[where] = torch.linalg.solve(right, torch.linalg.solve(left, G).T).T.flatten()
        return found

    want = written_out(case, update)
    close(train(case, sgd, kfac(beta)), want)
    assert apart(train(case, sgd, kfac(beta, pi=False))[-1], want[-1])


# -- 31 ----------------------------------------------------------------------------------------------------------------


def held(preconditioner: precond.Preconditioner) -> Tensor:
    return torch.cat([operator.to_dense().flatten() for operator in preconditioner.operators.values()])


@pytest.mark.parametrize(("kind", "equal"), [(0.9, True), (history.Ema(0.9, debias=False), False), (history.Mean(), True), ("local", True)])
@pytest.mark.parametrize("repr", ["full", "layer", "unit", "diagonal", "kron_io", "kron_dim"])
def test_31_the_average_of_a_constant_is_that_constant_from_the_first_step(kind: Any, equal: bool, repr: str) -> None:
    case, found = CASES["mlp"], []
    model, criterion = case.make(), copy.deepcopy(case.criterion)
    p = precond.Preconditioner(matrix="ggn", repr=repr, solver="eigen", damping=1.0, history=kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    p.attach(model, criterion, optimizer)
    constant = precond.curvature(model, criterion, case.inputs, case.targets, matrix="ggn", repr=repr)
    want = torch.cat([block.to_dense().flatten() for block in constant.blocks.values()])
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(case.inputs), case.targets).backward()
        optimizer.step()
        found.append(held(p))
    for each in found:
        if equal:
            torch.testing.assert_close(each, want, rtol=1e-10, atol=1e-10)
        else:
            assert apart(each, want)


def numbers(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [each for key in state if key not in ("step", "counters") for each in numbers(state[key])]
    return [state.clone() if isinstance(state, Tensor) else state]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("curvature", "solver"), [(3, None), (1, 3), (2, 4)])
def test_31_with_intervals_nothing_changes_in_between(curvature: int, solver: int | None) -> None:
    case = CASES["mlp"]
    model, criterion = case.make(), copy.deepcopy(case.criterion)
    options = {"history": 0.9, "curvature_interval": curvature, "solver_interval": solver, "seed": 1}
    p = precond.Preconditioner(matrix="fisher_mc", repr="kron_io", solver="cholesky", damping=0.1, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    p.attach(model, criterion, optimizer)
    before: dict[str, list[Any]] = {"statistics": [], "state": []}
    for step in range(9):
        optimizer.zero_grad()
        criterion(model(case.inputs), case.targets).backward()
        optimizer.step()
        blocks = p.state_dict()["blocks"]
        for key, every in (("statistics", curvature), ("state", solver or curvature)):
            after = numbers({name: block[key] for name, block in blocks.items()})
            assert same(before[key], after) == (step % every != 0), (key, step)
            before[key] = after


FORGETTING = (
    "newton", "natural_gradient", "ekfac", "layer_wise_newton", "layer_wise_ng", "neumann", "newton_cg", "saddle_free_newton",  # no state
    "sophia_h",  # every coordinate is clipped to the sign of the momentum in these steps
)  # fmt: skip
"""Recipes that go on alike without the state of the steps before."""


@pytest.mark.parametrize("recipe", precond.recipes())
def test_31_a_saved_state_goes_on_bit_for_bit(recipe: str) -> None:
    case = CASES["mlp"]

    def loop(model: nn.Module, p: precond.Preconditioner, steps: int) -> None:
        criterion = copy.deepcopy(case.criterion)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with p.attach(model, criterion, optimizer):
            for _ in range(steps):
                optimizer.zero_grad()
                criterion(model(case.inputs), case.targets).backward()
                optimizer.step()

    straight, first = case.make(), case.make()
    p = precond.recipe(recipe, seed=4)
    loop(first, p, 3)
    saved = io.BytesIO()
    torch.save(p.state_dict(), saved)
    saved.seek(0)
    resumed, forgetful, again = copy.deepcopy(first), copy.deepcopy(first), precond.recipe(recipe, seed=99)
    again.load_state_dict(torch.load(saved, weights_only=True))
    loop(resumed, again, 2)
    loop(straight, precond.recipe(recipe, seed=4), 5)
    assert all(map(torch.equal, resumed.parameters(), straight.parameters()))
    loop(forgetful, precond.recipe(recipe, seed=99), 2)
    assert all(map(torch.equal, forgetful.parameters(), straight.parameters())) == (recipe in FORGETTING)
