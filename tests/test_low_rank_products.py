"""Claims about low-rank forms that need no rows: method="sketch" and method="lanczos". Exact to 1e-10 against dense matrices.

- Identity 18 for matrices with products alone: the eigenpairs of the Hessian and of |H| that are largest in absolute value have the error
  of Eckart and Young, by layer as well; with fewer products than that takes the error is larger, and of the size of the next eigenvalues.
- Averages over steps keep the positive and the negative part by re-compression, as a dense loop does; ranks see one matrix.
- A sketch is the Nystrom formula on its directions: exact where C has no larger rank, of every matrix and by every kind of observation;
  elsewhere 0 <= C_k <= C, and the trace of what is lost is within the deterministic bound of Halko, Martinsson and Tropp. Its average over
  steps is the sketch of the average, which the average of truncated rows is not.
- What is not finite counts for nothing. Rows are never held together; both train as dense solvers do where they are exact; a run resumes bit by bit.
- `eigenpairs` finds every copy of an eigenvalue and stops when the rest is zero.
"""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import dense_derived
import precond
from nets import CASES, normal
from precond.history import Ema, Window
from precond.lanczos import eigenpairs
from precond.operators import LowRank
from precond.representations import FullLowRank, LayerLowRank
from precond.solvers import SMW
from test_low_rank import best, eigen
from training import batches, differ, fit, make, matrix_of, net, plain, same, sgd, theta

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE = nn.CrossEntropyLoss()


def largest(M: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank of a symmetric matrix, indefinite or not."""
    d, V = torch.linalg.eigh(M)
    kept = d.abs().argsort(descending=True)[:rank]
    return (V[:, kept] * d[kept]) @ V[:, kept].T


def lost(M: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigvalsh(M).abs().sort(descending=True).values[rank:].square().sum().sqrt()


def curve(repr: Any, matrix: Any = "hessian", name: str = "mlp") -> Any:
    case = CASES[name]
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=3)


# -- Lanczos -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["hessian", "abs_hessian"])
@pytest.mark.parametrize("rank", [1, 4])
def test_18_the_leading_eigenpairs_of_a_hessian_have_the_error_of_eckart_and_young(matrix: str, rank: int) -> None:
    M = dense_cells.whole(CASES["mlp"], matrix)
    got = curve(FullLowRank(rank=rank, products=50), matrix)
    assert isinstance(got.blocks["model"], LowRank) and len(M) > 50
    close(torch.linalg.matrix_norm(got.to_dense() - M), lost(M, rank))
    close(got.to_dense(), largest(M, rank))
    assert torch.linalg.eigvalsh(dense_cells.whole(CASES["mlp"], "hessian"))[0] < -0.1, "the Hessian is indefinite"
    few = curve(FullLowRank(rank=rank, products=rank + 1), matrix).to_dense()
    differ(few, largest(M, rank), 1e-6)
    assert lost(M, rank) < torch.linalg.matrix_norm(few - M) < torch.linalg.matrix_norm(M)


def test_18_layers_are_found_each_for_itself() -> None:
    M = dense.project_layer(dense_cells.whole(CASES["mlp"], "hessian"), CASES["mlp"].make())
    got = curve(LayerLowRank(rank=2, products=20))
    for name, where in got.positions.items():
        close(got.blocks[name].to_dense(), largest(M[where[:, None], where], 2))
    differ(got.to_dense(), M, 1e-3)


def test_a_definite_matrix_has_the_same_pairs_by_products_as_by_rows() -> None:
    rows = curve(FullLowRank(rank=3), "ggn").to_dense()
    close(curve(FullLowRank(rank=3, method="lanczos", products=40), "ggn").to_dense(), rows)
    close(curve(FullLowRank(rank=3, method="rows"), "ggn").to_dense(), rows)


def test_every_copy_of_an_eigenvalue_is_found_and_zeros_end_the_process() -> None:
    values = torch.tensor([3.0, 3, 3, -2, -2, 1] + [0] * 24, dtype=torch.float64)
    Q = torch.linalg.qr(normal(30, 30, seed=5)).Q
    M, seen = (Q * values) @ Q.T, []

    def product(v: Tensor) -> Tensor:
        seen.append(v)
        return M @ v

    generator = torch.Generator().manual_seed(0)
    d, V = eigenpairs(product, lambda: torch.randn(30, dtype=torch.float64, generator=generator), 30)
    close((V * d) @ V.T, M)
    close(V.T @ V, torch.eye(len(d), dtype=torch.float64))
    assert len(seen) <= 12, "four distinct values, then three, then two, then nothing: no product for each of 24 zeros"
    seen.clear()
    d, V = eigenpairs(product, lambda: torch.randn(30, dtype=torch.float64, generator=generator), 4)
    assert len(seen) == 4 and len(d) == 4
    differ((V * d) @ V.T, M, 1e-3)  # one copy of each


HISTORIES: list[Any] = [Ema(0.8), Window(2), "local"]


def hessians(steps: int) -> list[Tensor]:
    """Of the steps of a run that moves nothing."""
    return [dense.hessian(net(), CE, x, y) for x, y in batches(steps)]


def still(repr: Any, history: Any, matrix: str = "hessian", steps: int = 3, damping: float = 2.0) -> Tensor:
    model, solver = net(), SMW()
    preconditioner = make(matrix, repr, solver, damping, history=history).attach(model, CE, optimizer := sgd(model, lr=0.0))
    for x, y in batches(steps):
        plain(model, CE, optimizer, x, y)
    return matrix_of(preconditioner)


@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize("matrix", ["hessian", "abs_hessian"])
def test_averages_are_those_of_a_dense_loop_that_truncates_each_sign(matrix: str, history: Any) -> None:
    rank = 4

    def parts(M: Tensor) -> tuple[Tensor, Tensor]:
        d, V = torch.linalg.eigh(largest(M, rank))
        return (V * d.clamp(min=0)) @ V.T, (V * (-d).clamp(min=0)) @ V.T

    found = [parts(H) for H in hessians(3)]
    sides = []
    for side in zip(*found, strict=True):
        if history == "local":
            sides.append(side[-1])
        elif isinstance(history, Window):
            sides.append((side[-1] + side[-2]) / 2)
        else:
            M, weight = torch.zeros_like(side[0]), 0.0
            for new in side:
                M, weight = best(0.8 * M + 0.2 * new, rank), 0.8 * weight + 0.2
            sides.append(M / weight)
    want = largest(sides[0] - sides[1], rank)
    got = still(FullLowRank(rank=rank, products=40), history, matrix)
    close(got, want if matrix == "hessian" else dense_derived.absolute(want))
    differ(got, still(FullLowRank(rank=rank + 1, products=40), history, matrix), 1e-4)


@pytest.mark.parametrize(("matrix", "solver"), [("abs_hessian", "smw"), ("abs_hessian", "eigen"), ("hessian", "smw")])
def test_with_every_pair_it_trains_as_a_dense_solver_does(matrix: str, solver: str) -> None:
    """The Hessian with a damping above its lowest eigenvalue."""
    reference = fit(make(matrix, "full", "eigen", 2.0), steps=3)
    same(fit(make(matrix, "full_low_rank", solver, 2.0), steps=3), reference)
    differ(fit(make(matrix, FullLowRank(rank=2), solver, 2.0), steps=3), reference)


# -- sketches ------------------------------------------------------------------------------------------------------------


def directions(repr: Any, n: int) -> Tensor:
    """W (k, n) as documented: orthonormal, the same for blocks of one size."""
    from precond.randomness import keyed_generator

    width = min(repr.rank + repr.oversample, n)
    drawn = torch.randn(n, width, dtype=torch.float64, generator=keyed_generator(torch.device("cpu"), "directions", repr.seed, n))
    return torch.linalg.qr(drawn).Q.T


def nystrom(M: Tensor, W: Tensor, rank: int | None = None) -> Tensor:
    """M W^T (W M W^T)^+ W M; of an indefinite M by the `rank` largest eigenvalues of the small matrix."""
    core = W @ M @ W.T
    d, Z = torch.linalg.eigh((core + core.T) / 2)
    if rank is not None and d[0] < -1e-12:
        kept = d.abs().argsort(descending=True)[:rank]
    else:
        kept = (d.abs() > 1e-13).nonzero().flatten()
    side = M @ W.T @ Z[:, kept]
    return (side / d[kept]) @ side.T


SKETCHED = ["ggn", "fisher", "empirical_fisher", "gradient_covariance", "batched_empirical_fisher"]


@pytest.mark.parametrize("matrix", [*SKETCHED, "hessian", "abs_hessian"])
def test_a_sketch_as_wide_as_the_rank_is_exact(matrix: str) -> None:
    M = dense_cells.whole(CASES["mlp"], matrix)
    rank = int(torch.linalg.matrix_rank(M, hermitian=True))
    got = curve(FullLowRank(rank=rank, method="sketch", oversample=0), matrix).to_dense()
    close(got, M)
    if rank > 1:
        differ(curve(FullLowRank(rank=rank - 1, method="sketch", oversample=0), matrix).to_dense(), M, 1e-6)


@pytest.mark.parametrize("matrix", ["ggn", "gradient_covariance", "hessian"])
@pytest.mark.parametrize("oversample", [0, 1])
def test_a_narrower_one_is_nystroms_formula(matrix: str, oversample: int) -> None:
    M, repr = dense_cells.whole(CASES["mlp"], matrix), FullLowRank(rank=2, method="sketch", oversample=oversample, seed=2)
    want = largest(nystrom(M, directions(repr, len(M)), 2), 2)
    close(curve(repr, matrix).to_dense(), want)
    differ(curve(FullLowRank(rank=2, method="sketch", oversample=oversample, seed=1), matrix).to_dense(), want, 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_sketch_loses_is_bounded(seed: int) -> None:
    """0 <= C_k <= C, and trace(C - C_k) <= trace(D2) + |D2^(1/2) W2^T (W1^T)^+|_F^2 for every split of the spectrum."""
    M = dense_cells.whole(CASES["mlp"], "ggn")
    repr = FullLowRank(rank=6, method="sketch", oversample=0, seed=seed)
    got, W = curve(repr, "ggn").to_dense(), directions(repr, len(M))
    d, V = eigen(M)
    d = d.clamp(min=0)
    left, bounds = (M - got).trace(), []
    assert torch.linalg.eigvalsh(M - got)[0] > -1e-12 and torch.linalg.eigvalsh(got)[0] > -1e-12
    for r in range(1, 6):
        W1, W2 = W @ V[:, :r], W @ V[:, r:]
        bounds.append(d[r:].sum() + (d[r:].sqrt().unsqueeze(1) * (W2.T @ torch.linalg.pinv(W1.T))).square().sum())
    assert d[6:].sum() - 1e-12 <= left <= min(bounds) + 1e-12
    assert left > 1.01 * d[6:].sum(), "negative control: it is not the best of its rank"


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_the_average_of_sketches_is_the_sketch_of_the_average(matrix: str) -> None:
    repr = FullLowRank(rank=5, method="sketch", oversample=4)
    average = torch.zeros(43, 43, dtype=torch.float64)
    for x, y in batches(3):
        average = 0.8 * average + 0.2 * dense_cells.MATRICES[matrix](net(), CE, x, y)
    average = average / (1 - 0.8**3)
    want = largest(nystrom(average, directions(repr, 43), 5), 5)
    close(still(repr, 0.8, matrix), want)
    if matrix == "ggn":
        wide = FullLowRank(rank=36, method="sketch", oversample=0)  # as large as the rank of three steps
        close(still(wide, 0.8, matrix), average)
        differ(still(FullLowRank(rank=12), 0.8, matrix), average, 1e-6)


def test_a_sketch_of_columns_never_holds_rows() -> None:
    """Its statistics add over columns, so that they are reduced as they come back."""
    preconditioner = make("ggn", FullLowRank(rank=2, method="sketch", oversample=1), "smw").attach(model := net(), CE, optimizer := sgd(model))
    plain(model, CE, optimizer, *batches(1, size=40)[0])
    sizes = [t.numel() for t in _tensors(preconditioner.state_dict()["blocks"])]
    assert sizes and max(sizes) <= 3 * 43
    notes = [row.note for row in preconditioner.describe().rows]
    assert all("sketch of 3 directions" in note for note in notes)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    found = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
    return [t for value in found for t in _tensors(value)]


@pytest.mark.parametrize("form", [FullLowRank, LayerLowRank])
@pytest.mark.parametrize("matrix", ["ggn", "gradient_covariance", "batched_empirical_fisher"])
def test_a_wide_sketch_trains_as_a_dense_solver_does(form: Any, matrix: str) -> None:
    dense_form = "full" if form is FullLowRank else "layer"
    reference = fit(make(matrix, dense_form, "cholesky", history=0.9), steps=3)
    same(fit(make(matrix, form(rank=43, method="sketch"), "smw", history=0.9), steps=3), reference)
    differ(fit(make(matrix, form(rank=2, method="sketch", oversample=0), "smw", history=0.9), steps=3), reference)


# -- both ----------------------------------------------------------------------------------------------------------------

RUNS: dict[str, Any] = {
    "lanczos": lambda: make("hessian", FullLowRank(rank=3, products=8), "smw", 2.0, history=0.9),
    "sketch": lambda: make("ggn", LayerLowRank(rank=3, method="sketch"), "smw", history=0.9),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str) -> None:
    data = batches(5)
    whole = fit(RUNS[name](), data=data)
    model = fit(first := RUNS[name](), data=data[:3])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = copy.deepcopy(net())
    again.load_state_dict(model.state_dict())
    second = RUNS[name]().attach(again, CE, optimizer := sgd(again))
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for x, y in data[3:]:
        plain(again, CE, optimizer, x, y)
    torch.testing.assert_close(theta(again), theta(whole), rtol=0, atol=0)


@pytest.mark.parametrize("repr", [FullLowRank(), FullLowRank(rank=3, products=9), FullLowRank(rank=3, method="sketch")], ids=str)
def test_an_observation_that_is_not_finite_counts_for_nothing(repr: Any) -> None:
    kept = []
    for poisoned in (False, True):
        preconditioner = make("hessian", repr, "smw", 9.0).attach(model := net(), CE, optimizer := sgd(model, lr=0.0))
        first, (x, y) = batches(2)
        plain(model, CE, optimizer, *first)
        if poisoned:
            plain(model, CE, optimizer, x * torch.nan, y)
        kept.append(matrix_of(preconditioner))
    close(kept[1], kept[0])
    assert kept[0].norm() > 0.1


def test_the_weights_of_the_loss_are_given_once() -> None:
    """What is made of whole products has the weights of the loss in it already."""
    for repr in (FullLowRank(), FullLowRank(rank=43, method="sketch")):
        model = net()
        preconditioner = make("hessian", repr, "smw", 9.0, loss_weights="given").attach(model, CE, optimizer := sgd(model, lr=0.0))
        x, y = batches(1)[0]
        optimizer.zero_grad()
        (3.0 * CE(model(x), y)).backward()
        optimizer.step()
        close(matrix_of(preconditioner), 3.0 * dense.hessian(net(), CE, x, y))


def test_options_are_checked() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "qr"}, "method"), ({"method": "sketch"}, "rank="), ({"rank": 2, "oversample": -1}, "oversample"),
        ({"rank": 3, "products": 2}, "products"), ({"rank": 2, "method": "sketch", "gather": 3}, "gather"),
        ({"sketch": 5, "method": "lanczos"}, "sketch"),
    ]  # fmt: skip
    for options, word in wrong:
        with pytest.raises(ValueError, match=word):
            LayerLowRank(**options)
    with pytest.raises(precond.InvalidCombination, match="is built from columns"):
        make("hessian", LayerLowRank(sketch=4), "smw")
    with pytest.raises(precond.InvalidCombination, match="is built from columns"):
        make("hessian", FullLowRank(method="rows"), "smw")
    with pytest.raises(precond.InvalidCombination, match=r"keeps rows"):
        make("hessian", FullLowRank(), "smw", history=0.9)
