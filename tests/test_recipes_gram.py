"""What the recipes that invert by rows, vectors or small blocks claim, beside the steps of `test_recipes.py`.

* smw_ng, seng, mfac, tonga, eva: with a large damping l, l d is the gradient. smw_gn, from the factors, is the dense Gauss-Newton solve.
* skfac: K-FAC by dense factors and Cholesky, also with several columns an example; it holds the rows of the batch where these are fewer.
* seng: a model of one layer is smw_ng, one of several is not. Its sketch: `test_gram_sketch.py`.
* mfac: the first step is g / (l + |g|^2 / m); a full window has forgotten what left it; the window's Gram matrix is that of its rows.
* ggt: with a long window the pseudo-inverse root of full-matrix AdaGrad; with m = 1 the normalised gradient; below the threshold no step.
* tonga: truncation that leaves nothing out is exact, one that does is not; with one gradient a step d is the last column of
  X (X^T X + l I)^-1; the normalised average has the damping l / w.
* eva: one example is K-FAC of the empirical Fisher itself, several are not.
* mini_block_fisher: 1 x 1 kernels are the diagonal; the block of a fully connected layer is one-sided Shampoo's factor / out, with exponent 1;
  shared blocks are means over units of the exact ones, for every matrix; equal blocks are inverted once.
* What windows that age, sums that forget and repeated blocks keep is saved: a run that goes on from a file is the same to the bit.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import dense_blocks
import dense_cells
import dense_kron
import nets
import precond
from dense_cells import ALL
from precond.damping import Factored, Outside, Tikhonov
from precond.history import Ema, Local, Sum, Window
from precond.operators import Dense, Diagonal, Kronecker, LowRank, Repeated
from precond.representations import FullLowRank, KronDim, KronIO, LayerGram, Unit
from precond.solvers import SMW, Eigen
from references import mfac as mfac_reference
from references.common import NETWORKS, Batch, Network, theta

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
MLP, CONV, WIDE, LINEAR = (NETWORKS[name] for name in ("mlp", "conv", "wide", "linear"))


def directions(recipe: str, network: Network, batches: list[Batch], *, lr: float = 0.0, **arguments: Any) -> tuple[Tensor, Tensor]:
    """(gradients, directions), each (steps, P): p.grad before and after the preconditioner. No parameter moves where lr is 0."""
    model = network.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gradients, found = [], []
    with precond.recipe(recipe, seed=3, **{"transforms": []} | arguments).attach(model, network.criterion, optimizer):
        for inputs, targets in batches:
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            gradients.append(_grad(model))
            optimizer.step()
            found.append(_grad(model))
    return torch.stack(gradients), torch.stack(found)


def _grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


@pytest.mark.parametrize("recipe", ["smw_ng", "seng", "mfac", "tonga", "tonga_unit", "eva", "mini_block_fisher"])
def test_a_large_damping_leaves_the_gradient(recipe: str) -> None:
    gradients, found = directions(recipe, CONV, CONV.batches(2), damping=1e9)
    assert_close(1e9 * found, gradients, rtol=1e-6, atol=1e-9)
    gradients, found = directions(recipe, CONV, CONV.batches(2), damping=1.0)
    assert (found - gradients).norm() > 1e-3 * gradients.norm()  # negative


def test_smw_gn_is_the_dense_gauss_newton_solve() -> None:
    for network in (MLP, CONV, LINEAR):
        batches = network.batches(1)
        gradients, found = directions("smw_gn", network, batches, damping=0.01)
        G = dense.ggn(network.make(), network.criterion, *batches[0])
        assert_close(found[0], torch.linalg.solve(G + 0.01 * torch.eye(len(G), dtype=G.dtype), gradients[0]), **EXACT)
        F = dense.empirical_fisher(network.make(), network.criterion, *batches[0])
        assert (found[0] - torch.linalg.solve(F + 0.01 * torch.eye(len(G), dtype=G.dtype), gradients[0])).norm() > 1e-3 * found.norm()


# --- skfac


@pytest.mark.parametrize("matrix", ["fisher_mc", "fisher", "empirical_fisher"])
def test_skfac_is_kfac_by_dense_factors(matrix: str) -> None:
    for network, sharing in ((WIDE, "expand"), (MLP, "expand"), (CONV, "expand"), (CONV, "reduce")):
        options: dict[str, Any] = {"matrix": matrix, "damping": 0.01, "lr": 0.1}
        rows, whole = KronIO(input="rows", output="rows", sharing=sharing), KronIO(sharing=sharing)
        ours = directions("skfac", network, network.batches(2), repr=rows, **options)[1]
        dense_ones = directions("skfac", network, network.batches(2), repr=whole, solver="cholesky", **options)[1]
        assert_close(ours, dense_ones, **EXACT)
    plain = directions("skfac", WIDE, WIDE.batches(1), matrix=matrix, damping=Factored(0.02))[1]
    assert (plain - directions("skfac", WIDE, WIDE.batches(1), matrix=matrix, damping=0.01)[1]).norm() > 1e-3 * plain.norm()


def test_skfac_holds_the_rows_of_the_batch_where_they_are_fewer() -> None:
    model = WIDE.make()
    preconditioner = precond.recipe("skfac", seed=0).attach(model, WIDE.criterion, torch.optim.SGD(model.parameters(), lr=0.1))
    inputs, targets = WIDE.batch(0)
    WIDE.criterion(model(inputs), targets).backward()
    preconditioner.step()
    (B, A), (D, C) = (preconditioner.operators[name].factors for name in ("0", "2"))  # type: ignore[attr-defined]
    assert [(type(F), F.rank, F.size) for F in (B, A, D, C)] == [(LowRank, 4, 7), (LowRank, 4, 10), (LowRank, 3, 3), (LowRank, 4, 8)]


# --- seng


def test_seng_of_one_layer_is_smw_ng_and_of_several_is_not() -> None:
    for network, equal in ((LINEAR, True), (MLP, False)):
        ours = directions("seng", network, network.batches(2), damping=0.1, curvature_interval=1)[1]
        whole = directions("smw_ng", network, network.batches(2), damping=0.1)[1]
        assert bool((ours - whole).abs().max() < 1e-10) is equal


# --- mfac, ggt


def test_the_first_step_of_mfac() -> None:
    (gradient,), (found,) = directions("mfac", MLP, MLP.batches(1), damping=0.01, history=Window(5, reduction="padded"))
    assert_close(found, gradient / (0.01 + gradient @ gradient / 5), **EXACT)
    (found,) = directions("mfac", MLP, MLP.batches(1), damping=0.01, history=Window(5))[1]
    assert_close(found, gradient / (0.01 + gradient @ gradient), **EXACT)  # without zeros in the empty places


def test_a_window_of_mfac_forgets_what_left_it() -> None:
    batches = MLP.batches(6)
    gradients, found = directions("mfac", MLP, batches, history=Window(3, reduction="padded"))
    assert_close(found[-1], directions("mfac", MLP, batches[-3:], history=Window(3, reduction="padded"))[1][-1], **EXACT)
    H = mfac_reference._inverse(list(gradients[-3:]), 1e-2, 3)
    assert_close(found[-1], H @ gradients[-1], **EXACT)
    other = directions("mfac", MLP, batches[-4:], history=Window(4, reduction="padded"))[1][-1]
    assert (found[-1] - other).norm() > 1e-3 * found[-1].norm()


def test_ggt_with_a_long_window_is_full_matrix_adagrad() -> None:
    gradients, found = directions("ggt", MLP, MLP.batches(5), solver=SMW(power=0.5, complement="zero", threshold=1e-12))
    C = gradients.T @ gradients
    values, vectors = torch.linalg.eigh(C)
    kept = values > 1e-12
    assert_close(found[-1], vectors[:, kept] @ (values[kept] ** -0.5 * (vectors[:, kept].T @ gradients[-1])), rtol=1e-8, atol=1e-8)
    adagrad = directions("ggt", MLP, MLP.batches(5), repr="full", solver=Eigen(power=0.5), history=Sum(), damping=Outside(1e-3))[1]
    with_eps = directions("ggt", MLP, MLP.batches(5), solver=SMW(power=0.5), damping=Outside(1e-3))[1]
    assert_close(with_eps, adagrad, rtol=1e-8, atol=1e-8)


def test_ggt_of_one_gradient_normalises_it_and_below_the_threshold_makes_no_step() -> None:
    gradients, found = directions("ggt", MLP, MLP.batches(2), history=Window(1, reduction="sum"))
    assert_close(found, gradients / gradients.norm(dim=1, keepdim=True), **EXACT)
    square = float(gradients[0] @ gradients[0])
    for threshold, moves in ((0.9 * square, True), (1.1 * square, False)):
        solver = SMW(power=0.5, complement="zero", threshold=threshold)
        (step,) = directions("ggt", MLP, MLP.batches(1), solver=solver)[1]
        assert bool(step.norm() > 0) is moves


# --- tonga


def test_a_truncation_that_leaves_nothing_out_is_exact() -> None:
    batches = MLP.batches(5)
    arguments = {"matrix": "batched_empirical_fisher", "damping": 0.1, "history": Sum(decay=0.9)}
    exact = directions("tonga", MLP, batches, repr=FullLowRank(rank=5), **arguments)[1]
    gathered = directions("tonga", MLP, batches, repr=FullLowRank(rank=4, gather=50), **arguments)[1]
    dense_ones = directions("tonga", MLP, batches, repr="full", solver="cholesky", **arguments)[1]
    assert_close(exact, dense_ones, **EXACT)
    assert_close(gathered, dense_ones, **EXACT)
    cut = directions("tonga", MLP, batches, repr=FullLowRank(rank=2), **arguments)[1]
    assert_close(cut[:2], dense_ones[:2], **EXACT)
    assert (cut[-1] - dense_ones[-1]).norm() > 1e-4 * cut[-1].norm()


def test_tonga_is_the_last_column_of_a_small_solve() -> None:
    batches = MLP.batches(4)
    gradients, found = directions("tonga", MLP, batches, matrix="batched_empirical_fisher", damping=0.1, history=Sum(decay=0.9))
    X = (0.9 ** (torch.arange(3, -1, -1) / 2).double() * gradients.T.contiguous()).double()
    last = torch.zeros(4, dtype=torch.float64)
    last[-1] = 1.0
    assert_close(found[-1], X @ torch.linalg.solve(X.T @ X + 0.1 * torch.eye(4, dtype=X.dtype), last), **EXACT)


def test_the_normalised_tonga_has_another_damping() -> None:
    batches, weight = MLP.batches(4), sum(0.9**j for j in range(4))
    plain = directions("tonga", MLP, batches, damping=0.1, history=Sum(decay=0.9))[1][-1]
    normalised = directions("tonga", MLP, batches, damping=0.1 / weight, history=Ema(0.9))[1][-1]
    assert_close(plain * weight, normalised, **EXACT)
    assert (directions("tonga", MLP, batches, damping=0.1, history=Ema(0.9))[1][-1] - normalised).norm() > 1e-3 * normalised.norm()


# --- eva


@pytest.mark.parametrize("examples", [1, 4])
def test_eva_of_one_example_is_kfac(examples: int) -> None:
    (inputs, targets) = MLP.batch(0)
    batches = [(inputs[:examples], targets[:examples])]
    ours = directions("eva", MLP, batches)[1]
    kfac = directions("eva", MLP, batches, repr="kron_io", solver="eigen", damping=Tikhonov(0.03))[1]
    assert bool((ours - kfac).abs().max() < 1e-10) is (examples == 1)
    gradients, found = directions("eva", MLP, batches)
    model = MLP.make()
    where = dense.joint_indices(model, "2")
    sent = (dense.predict(model, batches[0][0]).softmax(1) - nn.functional.one_hot(batches[0][1], 3)).unsqueeze(0)
    ((a, g),) = dense_kron.capture(model, batches[0][0], sent, "2")
    u = torch.kron(g.mean((0, 1, 2)), a.mean((0, 1)))
    C = torch.outer(u, u) + 0.03 * torch.eye(len(u), dtype=u.dtype)
    assert_close(found[0][where], torch.linalg.solve(C, gradients[0][where]), **EXACT)


# --- mini-blocks


def test_mini_blocks_of_1_x_1_kernels_are_the_diagonal() -> None:
    network = Network(
        lambda: nets.seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1), nn.Flatten(2))), nn.CrossEntropyLoss(),
        lambda t: (nets.normal(4, 2, 2, 2, seed=t), nets.labels(3, 16, seed=t).reshape(4, 4)),
    )  # fmt: skip
    options: dict[str, Any] = {"damping": 0.01, "history": Ema(0.9, schedule="first")}
    ours = directions("mini_block_fisher", network, network.batches(3), **options)[1]
    diagonal = directions("mini_block_fisher", network, network.batches(3), repr="diagonal", solver="elementwise", **options)[1]
    assert_close(ours, diagonal, **EXACT)
    ours = directions("mini_block_fisher", CONV, CONV.batches(3), **options)[1]
    diagonal = directions("mini_block_fisher", CONV, CONV.batches(3), repr="diagonal", solver="elementwise", **options)[1]
    assert (ours - diagonal).norm() > 1e-3 * ours.norm()


def test_the_shared_block_is_the_factor_of_one_sided_shampoo_with_exponent_1() -> None:
    ours = directions("mini_block_fisher", MLP, MLP.batches(3), damping=0.01, history=Local())[1]
    for name, out in (("0.weight", 5), ("4.weight", 3)):
        one_sided: dict[str, Any] = {"repr": KronDim(modes=(1,)), "solver": "eigen", "damping": Tikhonov(0.01 * out)}
        other = directions("mini_block_fisher", MLP, MLP.batches(3), history=Local(), **one_sided)[1]
        where = dense.positions(MLP.make())[name]
        assert_close(ours[:, where], out * other[:, where], **EXACT)


_MATRICES = ("ggn", "empirical_fisher", "batched_empirical_fisher", "gradient_covariance", "hessian")
_SHARED = [("mlp", matrix) for matrix in _MATRICES] + [("conv", "ggn"), ("conv", "gradient_covariance")]


@pytest.mark.parametrize("block", ["row", "kernel"])
@pytest.mark.parametrize(("name", "matrix"), [*_SHARED, ("mlp", "abs_hessian"), ("mlp", "input_second_moment")])
def test_shared_blocks_are_means_over_units(name: str, matrix: str, block: Any) -> None:
    case, second = ALL[name], matrix == "abs_hessian"
    if matrix == "input_second_moment" and block == "kernel":
        with pytest.raises(precond.InvalidCombination):
            precond.recipe("mini_block_fisher", matrix=matrix)
        return
    held = dense_cells.held(case, "hessian" if second else matrix)
    model, want, own = case.make(), torch.zeros_like(held), torch.zeros_like(held)
    places = {n: range(p.start, p.stop) for n, p in dense.positions(model).items()}
    matrices = [set(places[n]) for n, p in model.named_parameters() if p.dim() == 2]
    units = dense_blocks.kernel_indices(model) if block == "kernel" else dense.unit_indices(model)
    alike = [[u for u in units if set(u.tolist()) & of] for of in matrices]
    alike += [[u] for u in units if not any(set(u.tolist()) & of for of in matrices)]
    for group in alike:
        mean = sum(held[u[:, None], u] for u in group) / len(group)
        for u in group:
            own[u[:, None], u] = held[u[:, None], u]
            want[u[:, None], u] = dense_cells.dense_derived.absolute(mean) if second else mean
    repr = Unit(block=block, shared="matrices")
    C = precond.curvature(model, case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=11)
    assert_close(C.to_dense(), want, **EXACT)
    shared = [C for C in C.blocks.values() if isinstance(C, Repeated)]
    assert len(shared) == len(matrices)
    assert all(C.operator.n < C.n for C in shared)
    if matrix != "input_second_moment":  # whose units are alike
        assert (want - own).norm() > 1e-4 * own.norm()


def test_equal_blocks_are_inverted_once_and_hold_one() -> None:
    A = nets.normal(4, 3)
    A = A.T @ A
    C = Repeated(Dense(A), 5)
    solver = precond.solvers.get("cholesky")()
    state = solver.init(C, Tikhonov(0.1))
    assert state["count"] == 5 and state["each"]["factor"].shape == (3, 3)
    v = nets.normal(15, 2, seed=1)
    damped = torch.kron(torch.eye(5).double(), A + 0.1 * torch.eye(3).double())
    assert_close(solver.apply(state, v)[0], torch.linalg.solve(damped, v), **EXACT)
    whole = Kronecker(Diagonal(torch.ones(5).double()), A)
    mine, other = (precond.inverse(each, solver="eigen", damping=Tikhonov(0.1), power=0.5) @ v for each in (C, whole))
    assert_close(mine, other, **EXACT)
    with pytest.raises(ValueError, match="at least one block"):
        Repeated(Dense(A), 0)


def test_a_shared_block_has_no_pairs_of_its_own() -> None:
    with pytest.raises(precond.InvalidCombination, match="is built from"):
        precond.Preconditioner(matrix="bfgs_hessian", repr=Unit(shared="matrices"), solver="cholesky")
    with pytest.raises(ValueError, match="choose 'none' or 'matrices'"):
        Unit(shared="all")  # type: ignore[arg-type]
    model = nn.Linear(4, 3)
    described = str(precond.recipe("mini_block_fisher").attach(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)).describe())
    assert "one block, shared by its units" in described


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("ggt", {"history": Window(2, reduction="sum", decay=0.5)}), ("tonga", {}), ("eva", {}), ("mini_block_fisher", {}), ("smw_ng", {}),
        ("seng", {"repr": LayerGram(sketch=2), "curvature_interval": 2}),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_from_a_file_is_the_same(recipe: str, options: dict[str, Any]) -> None:
    def run(model: nn.Module, batches: list[Batch], saved: Any = None) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        preconditioner = precond.recipe(recipe, seed=3, **options).attach(model, MLP.criterion, optimizer)
        if saved is not None:
            preconditioner.load_state_dict(saved)
        for inputs, targets in batches:
            optimizer.zero_grad()
            MLP.criterion(model(inputs), targets).backward()
            optimizer.step()
        file = io.BytesIO()
        torch.save(preconditioner.state_dict(), file)
        preconditioner.remove()
        file.seek(0)
        return torch.load(file, weights_only=True)

    whole, halves, forgets = MLP.make(), MLP.make(), MLP.make()
    run(whole, MLP.batches(5))
    run(halves, MLP.batches(5)[3:], run(halves, MLP.batches(5)[:3]))
    run(forgets, MLP.batches(5)[:3])
    run(forgets, MLP.batches(5)[3:])
    assert_close(theta(halves), theta(whole), rtol=0, atol=0)
    assert not torch.equal(theta(forgets), theta(whole))
