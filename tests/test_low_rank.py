"""Claims about C held as rows: `full_low_rank`, `layer_low_rank`, `unit_low_rank`. Exact to 1e-10 against dense matrices and plain loops.

- Truncation by rank, energy and tolerance has the error of Eckart and Young, of centred matrices and of each unit as well.
- Under every history the operator is what a loop over dense matrices has: windows (M-FAC, GGT), averages by re-compression, TONGA's columns
  that gather between truncations; where nothing is lost that is the dense average, and where something is, it is below it.
- A window computes the products of its new rows only.
- Training with `smw` is training with a dense solver.
- SENG's sketch has the Gram matrix as its mean over all draws; draws are new at each refresh, and come again after a resume.
- L-BFGS is dense BFGS while it remembers every pair, and the two-loop recursion when it does not.
- Histories that rows cannot have are refused at construction.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dense
import dense_cells
import dense_secant as loops
import precond
from nets import CASES
from precond.damping import Outside
from precond.errors import InvalidCombination
from precond.history import Ema, Mean, Sum, Window
from precond.matrices import BFGSHessian
from precond.operators import LowRank, SecantMemory
from precond.representations import FullLowRank, LayerLowRank, UnitLowRank
from precond.solvers import BFGS, SMW
from precond.statistics import Stat
from precond.truncation import Truncation
from training import LR, batches, differ, fit, make, matrix_of, move, net, plain, same, sgd, solve, theta

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE = nn.CrossEntropyLoss()


def eigen(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, and vectors."""
    d, V = torch.linalg.eigh((M + M.T) / 2)
    return d.flip(0), V.flip(1)


def best(M: Tensor, rank: int) -> Tensor:
    d, V = eigen(M)
    return (V[:, :rank] * d[:rank]) @ V[:, :rank].T


# -- truncation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "gradient_covariance"])
@pytest.mark.parametrize("rank", [1, 3])
def test_18_the_error_of_a_rank_is_that_of_eckart_and_young(matrix: str, rank: int) -> None:
    case = CASES["mlp"]
    M = dense_cells.whole(case, matrix)
    got = precond.curvature(case.make(), CE, case.inputs, case.targets, matrix=matrix, repr=FullLowRank(rank=rank))
    assert isinstance(got.blocks["model"], LowRank) and got.blocks["model"].rank >= rank
    lost = eigen(M)[0][rank:]
    assert lost[0] > 1e-4
    close(torch.linalg.matrix_norm(got.to_dense() - M), lost.square().sum().sqrt())
    close(got.to_dense(), best(M, rank))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_18_units_and_layers_are_truncated_each_for_itself(name: str) -> None:
    case = CASES[name]
    M, model = dense_cells.held(case, "ggn"), case.make()
    data = (model, case.criterion, case.inputs, case.targets)
    for repr, project in ((LayerLowRank(rank=2), dense.project_layer), (UnitLowRank(rank=2), dense.project_unit)):
        want = torch.zeros_like(M)
        for members in project(torch.ones_like(M), model).unique(dim=0).bool():
            where = members.nonzero().flatten()
            want[where[:, None], where] = best(M[where[:, None], where], 2)
        got = precond.curvature(*data, matrix="ggn", repr=repr).to_dense()
        close(got, want)
        differ(got, project(M, model), 1e-3)


@pytest.mark.parametrize(("option", "amount"), [("energy", 0.5), ("energy", 0.9), ("energy", 1.0), ("tolerance", 0.1), ("tolerance", 0.6)])
def test_energy_and_tolerance_keep_what_they_say(option: str, amount: float) -> None:
    case = CASES["mlp"]
    M = dense_cells.whole(case, "ggn")
    d, _ = eigen(M)
    if option == "energy":
        number = next(r for r in range(1, len(d) + 1) if d[:r].sum() >= (amount - 1e-12) * d.sum())
    else:
        number = int((d > amount * d[0]).sum())
    got = precond.curvature(case.make(), CE, case.inputs, case.targets, matrix="ggn", repr=FullLowRank(**{option: amount})).blocks["model"]
    assert isinstance(got, LowRank)
    if amount < 1:
        assert got.rank == number < 20
    close(got.to_dense(), best(M, number))


def test_options_are_checked() -> None:
    wrong: list[dict[str, Any]] = [
        {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"tolerance": 1.0}, {"gather": 1}, {"gather": -1, "rank": 2}, {"memory": 0}, {"scaling": "all"},
        {"sketch": 0}, {"sketch": 5, "rank": 2},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            LayerLowRank(**options)


# -- histories -----------------------------------------------------------------------------------------------------------


def observed(steps: int = 6) -> list[Tensor]:
    """(n, p) rows of each step, of rank 4 in 7 dimensions."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 7, dtype=torch.float64, generator=generator) * (1 + k) for k in range(steps)]


SPECS = {
    "lossless": Truncation(rank=7), "rank": Truncation(rank=3), "tonga": Truncation(rank=2, gather=9), "energy": Truncation(energy=0.7),
}  # fmt: skip


@pytest.mark.parametrize("history", [Ema(0.8), Ema(0.8, debias=False), Ema(0.9, schedule="martens"), Sum(), Mean()], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_averages_are_those_of_a_dense_loop_that_truncates(history: Any, name: str) -> None:
    rule, spec = SPECS[name], {"U": Stat("rows", truncation=SPECS[name])}
    kept, M, exact, weight, number = None, torch.zeros(7, 7).double(), torch.zeros(7, 7).double(), 0.0, 0
    for t, U in enumerate(observed()):
        beta = 1.0 if isinstance(history, Sum | Mean) else min(1 - 1 / (t + 1), 0.9) if history.schedule == "martens" else history.beta
        take = 1.0 if isinstance(history, Sum | Mean) else 1 - beta
        kept = history.merge(kept, {"U": U}, spec)
        if rule.gather:
            if number >= 2 + rule.gather:
                M, number = best(M, 2), 2
            number += len(U)
        M, exact, weight = beta * M + take * U.T @ U, beta * exact + take * U.T @ U, beta * weight + take
        if not rule.gather:
            d = eigen(M)[0]
            M = best(M, next(r for r in range(1, 8) if d[:r].sum() >= 0.7 * d.sum()) if rule.energy else rule.rank)
        V = history.read(kept, spec)["U"]
        divisor = 1.0 if isinstance(history, Sum) or (isinstance(history, Ema) and not history.debias) else weight
        close(V.T @ V, M / divisor)
        assert len(V) <= (7 if not rule.gather else 2 + rule.gather + 3)
        assert eigen(exact / divisor - V.T @ V)[0].min() > -1e-10, "never above the exact average"
    assert ((exact - M).norm() < 1e-9) == (name == "lossless"), "negative control: what is lost is lost"


def test_an_invalid_observation_leaves_an_average_as_it_was() -> None:
    spec, history = {"U": Stat("rows", truncation=Truncation(rank=3))}, Ema(0.8)
    first = history.merge(None, {"U": observed()[0]}, spec)
    bad = history.merge(first, {"U": torch.full((4, 7), torch.nan).double()}, spec, torch.tensor(False))
    V, W = (history.read(kept, spec)["U"] for kept in (first, bad))
    close(W.T @ W, V.T @ V)


class Products(TorchDispatchMode):
    """The multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.count += out.numel() * args[0].shape[-1]
        return out


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("counts", [(2, 2, 2, 2, 2), (1, 3, 2, 4, 1)])
def test_the_gram_matrix_of_a_window_rolls(reduction: Any, batch: tuple[int, ...], counts: tuple[int, ...]) -> None:
    history, spec, kept = Window(3, reduction=reduction), {"U": Stat("rows", gram=True)}, None
    generator = torch.Generator().manual_seed(0)
    for step, count in enumerate(counts):
        x = torch.randn(count, *batch, 9, dtype=torch.float64, generator=generator)
        bad = step == 3
        with Products() as seen:
            kept = history.merge(kept, {"U": x * torch.nan if bad else x}, spec, torch.tensor(not bad))
        read = history.read(kept, spec)
        U = read["U"].movedim(0, -2)
        close(read["U.gram"], U @ U.mT)
        assert seen.count == math.prod(batch) * U.shape[-2] * count * 9, "the new rows with all, no more"
    assert "U.gram" not in history.read(history.merge(None, {"U": x}, {"U": Stat("rows")}), {"U": Stat("rows")})


def test_mfac_and_ggt_are_windows_of_gradients() -> None:
    """F = (1/m) sum g g^T + l I; and ((sum g g^T)^(1/2) + e I)^-1, by the eigendecomposition of dense matrices."""
    runs: list[tuple[Any, Any, Any]] = [(Window(3), SMW(), 0.1), (Window(3, reduction="sum"), SMW(power=0.5), Outside(0.1))]
    for history, solver, damping in runs:
        ours = fit(make("batched_empirical_fisher", "full_low_rank", solver, damping, history=history), steps=6)
        model, seen = net(), []
        for x, y in batches(6):
            seen = [*seen, dense.gradient(model, CE, x, y)][-3:]
            M = sum((torch.outer(g, g) for g in seen), torch.zeros(43, 43).double())
            if solver.power == 1:
                move(model, -LR * solve(M / len(seen), 0.1, seen[-1]))
            else:
                d, V = torch.linalg.eigh(M)
                d = torch.where(d > 1e-12 * d[-1], d, 0.0)  # three eigenvalues; the root of the noise in the others would be 1e-8
                move(model, -LR * V @ ((V.T @ seen[-1]) / (d.sqrt() + 0.1)))
        same(ours, model)
    differ(ours, fit(make("batched_empirical_fisher", "full_low_rank", solver, damping, history=Window(2, reduction="sum")), steps=6))


@pytest.mark.parametrize("repr", ["full", "layer", "unit"])
@pytest.mark.parametrize(("matrix", "history"), [("ggn", "local"), ("gradient_covariance", Window(2)), ("empirical_fisher", 0.9)])
def test_training_with_smw_is_training_with_a_dense_solver(repr: str, matrix: str, history: Any) -> None:
    reference = fit(make(matrix, repr, "cholesky", history=history), steps=4)
    forms = [getattr(precond.representations, f"{repr.title()}LowRank")(rank=43 if isinstance(history, float) else None)]
    forms += [f"{repr}_gram"] if not isinstance(history, float) else []
    for form in forms:
        same(fit(make(matrix, form, "smw", history=history), steps=4), reference)
    if repr == "full":
        differ(fit(make(matrix, FullLowRank(rank=2), "smw", history=history), steps=4), reference)


def test_histories_that_rows_cannot_have_are_refused() -> None:
    for repr, history in (("full_low_rank", 0.9), ("layer_gram", 0.9), ("layer_gram", Mean()), (UnitLowRank(rank=3), Sum(0.1))):
        with pytest.raises(InvalidCombination, match=r"keeps rows.*history='local' or Window"):
            make("ggn", repr, "smw", history=history)
    make("ggn", UnitLowRank(rank=3), "smw", history=Sum())


# -- SENG's sketch -------------------------------------------------------------------------------------------------------


def test_the_mean_of_a_sketch_over_all_draws_is_the_gram_matrix() -> None:
    U = observed()[0]
    total, number = torch.zeros(4, 4).double(), 0
    for chosen in itertools.combinations(range(7), 3):
        C = LayerLowRank(sketch=3).operator({"rows": U, "coordinates": torch.tensor(chosen), "draws": torch.tensor(1)}, None)  # type: ignore[arg-type]
        assert isinstance(C, LowRank)
        differ(C.gram, U @ U.T, 1e-3)
        total, number = total + C.gram, number + 1
        close(C.to_dense(), U.T @ U)
    close(total / number, U @ U.T)


def sketched(q: int, seed: int = 0, **options: Any) -> precond.Preconditioner:
    return make("empirical_fisher", LayerLowRank(sketch=q, seed=seed), "smw", **options)


def test_draws_are_new_at_each_refresh_and_keyed() -> None:
    exact = fit(make("empirical_fisher", "layer_low_rank", "smw"))
    same(fit(sketched(25)), exact)  # no layer has more parameters
    differ(fit(sketched(10)), exact)
    same(fit(sketched(10)), fit(sketched(10)))
    differ(fit(sketched(10)), fit(sketched(10, seed=1)))
    statistics, drawn = {"rows": observed()[0]}, []
    for _ in range(3):
        statistics = LayerLowRank(sketch=3).rebase(statistics)
        drawn.append(tuple(statistics["coordinates"].tolist()))
        assert len(set(drawn[-1])) == 3
    assert len(set(drawn)) == 3


RESUMED = {
    "sketch": partial(sketched, 10, solver_interval=2),
    "window": lambda: make("batched_empirical_fisher", "layer_low_rank", "smw", history=Window(3)),
    "average": lambda: make("ggn", UnitLowRank(rank=3), "smw", history=0.9),
    "gram": lambda: make("ggn", "full_gram", "smw", history=Window(2), solver_interval=3),
    "lbfgs": lambda: make("bfgs_hessian", FullLowRank(memory=2), "bfgs"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str) -> None:
    data = batches(7)
    whole = fit(RESUMED[name](), data=data)
    first = RESUMED[name]()
    model = fit(first, data=data[:4])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = copy.deepcopy(net())
    again.load_state_dict(model.state_dict())
    optimizer, second = sgd(again), RESUMED[name]()
    second.attach(again, CE, optimizer)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for x, y in data[4:]:
        plain(again, CE, optimizer, x, y)
    torch.testing.assert_close(theta(again), theta(whole), rtol=0, atol=0)


# -- L-BFGS --------------------------------------------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {},
    {"powell": 0.0},
    {"powell": 0.9},
    {"powell": 0.9, "powell_on": "inverse"},
    {"scale_initial": True},
    {"second": "add", "amount": 0.3},
    {"pairs": "gradients"},
]


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("repr", ["full", "layer"])
def test_11_with_full_memory_it_is_dense_bfgs(options: dict[str, Any], repr: str) -> None:
    form = {"full": FullLowRank, "layer": LayerLowRank}[repr]

    def run(held: Any, solver: Any, damping: float = 0.2) -> tuple[nn.Module, Tensor]:
        preconditioner = make(BFGSHessian(**options), held, solver, damping)
        model = fit(preconditioner, data=batches(2) * 3)
        return model, matrix_of(preconditioner, "model" if repr == "full" else "0")

    model, B = run(repr, "cholesky")
    for held in (form(memory=9, scaling="none"), form(memory=6, scaling="none")):
        limited, C = run(held, "bfgs")
        close(C, B)
        same(limited, model)
    differ(run(form(memory=1, scaling="none"), "bfgs")[1], B)
    differ(run(form(memory=9), "bfgs")[1], B)


def test_11_without_damping_its_inverse_is_that_which_bfgs_follows() -> None:
    options: dict[str, Any] = {"matrix": BFGSHessian(powell=0.0), "damping": 0.0}
    reference = fit(make(repr="full", solver="bfgs", **options), steps=6)
    same(fit(make(repr=FullLowRank(scaling="none"), solver=BFGS(), **options), steps=6), reference)
    differ(fit(make(repr=FullLowRank(), solver=BFGS(), **options), steps=6), reference)


def two_loops(S: Tensor, Y: Tensor, v: Tensor) -> Tensor:
    """The recursion of Nocedal and Wright, algorithm 7.4, with gamma of the newest pair."""
    q, alphas = v.clone(), []
    for s, y in zip(S.flip(0), Y.flip(0), strict=True):
        alphas.append((s @ q) / (s @ y))
        q -= alphas[-1] * y
    q *= (S[-1] @ Y[-1]) / (Y[-1] @ Y[-1])
    for s, y, alpha in zip(S, Y, reversed(alphas), strict=True):
        q += (alpha - (y @ q) / (s @ y)) * s
    return q


def test_with_less_memory_it_is_the_two_loop_recursion_on_the_last_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(43, 43, dtype=torch.float64, generator=generator)
    A = A @ A.T / 43 + torch.eye(43).double()
    pairs = [(s, A @ s) for s in torch.randn(7, 43, dtype=torch.float64, generator=generator)]
    pairs.insert(3, (pairs[0][0], -pairs[0][1]))  # without curvature: passed over
    C = precond.curvature(net(), CE, matrix=BFGSHessian(powell=0.0), repr=FullLowRank(memory=3), pairs=pairs)
    P = precond.inverse(C, solver="bfgs")
    S, Y = (torch.stack([pair[i] for pair in pairs[-3:]]) for i in (0, 1))
    v = torch.randn(43, dtype=torch.float64, generator=generator)
    close(P @ v, two_loops(S, Y, v))
    close(C @ S[-1], Y[-1])
    differ(P @ v, two_loops(S[1:], Y[1:], v))
    assert isinstance(C.blocks["model"], SecantMemory)
    B = (Y[-1] @ Y[-1]) / (S[-1] @ Y[-1]) * torch.eye(43).double()
    for s, y in zip(S, Y, strict=True):
        B, _ = loops.direct(B, s, y, loops.Rule(powell=0.0), False)
    close(C.to_dense(), B)
