"""Identities of the recipes over dimensions and of the inverse-free ones (float64, 1e-10), and of the options that they brought to the axes.

- Muon: exact, one step is the polar factor, and Shampoo's and CASPR's step; in five products the singular values are between 0.6 and 1.25; the step does
  not see the gradient's size. Its matrix is of the momentum: without momentum that is the gradient's, with it not. A vector is normalised.
- `ShapeScale`: both rules by hand, nothing before the start; shapes are those of [W, b] for representations that join them.
- TNT: a rank-one gradient is held exactly; a vector's matrix is the dense one; of one layer and one term the factor is (1/N) sum |a|^2 g g^T.
  Balancing leaves the product as it is, gives every factor one mean trace, and is what `Factored` does in other units.
- Distributed Shampoo: with whole blocks, a sum and no grafting it is Shampoo with eps at the start; with tiles of one entry it is Adam; grafting gives the
  step the norm of the other method's.
- CASPR's matrix is the power mean over the axes, of which Shampoo's is the limit.
- KL-Shampoo: repeated on one set of gradients it comes to rest at the normal likelihood's maximum, which other normalisations miss.
- SINGD with whole blocks is INGD; IKFAC on one batch comes to rest at K-FAC with damped factors.
- A run of each that is saved goes on as it was.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import dense_kron
import precond
from nets import labels, normal, seeded
from precond.damping import Factored, Floor, PerFactor
from precond.errors import InvalidCombination
from precond.history import Ema, Mean, Sum
from precond.matrices import BatchedEmpiricalFisher
from precond.operators import Dense, Kronecker, KroneckerSum
from precond.representations import KronDim, KronIO
from precond.transforms import Graft, Momentum, Scene, ShapeScale
from references.common import NETWORKS

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
EIGEN = precond.solvers.Eigen(power=0.5)


class Bare(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.held = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes])

    def give(self, *gradients: Tensor) -> None:
        for p, gradient in zip(self.held, gradients, strict=False):
            p.grad = gradient.clone()


def fed(preconditioner: precond.Preconditioner, gradients: Iterable[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """What it makes of gradients of one tensor, given by hand."""
    model, found = Bare(shape), []
    preconditioner.attach(model)
    for gradient in gradients:
        model.give(gradient)
        preconditioner.step()
        grad = model.held[0].grad
        found.append(torch.zeros_like(gradient) if grad is None else grad.clone())
    return found


def directions(recipe: str, gradients: Iterable[Tensor], **arguments: Any) -> list[Tensor]:
    gradients = list(gradients)
    return fed(precond.recipe(recipe, seed=0, **arguments), gradients, tuple(gradients[0].shape))


def differ(a: Tensor, b: Tensor) -> None:
    assert (a - b).norm() > 1e-3 * b.norm()


def polar(G: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    return U @ V


# --- Muon


def test_the_exact_step_of_muon_is_the_polar_factor_and_that_of_shampoo_and_caspr() -> None:
    G = normal(4, 4)
    none: dict[str, Any] = {"transforms": [], "damping": 0.0}
    (muon,) = directions("muon", [G], solver=EIGEN, **none)
    (shampoo,) = directions("shampoo", [G], history=Sum(), **none)
    (caspr,) = directions("caspr", [G], start_step=0, **none)
    for step in (muon, shampoo, caspr):
        assert_close(step, polar(G), rtol=1e-8, atol=1e-8)  # inverse roots of a square: half the digits of its smallest eigenvalue
    (two,) = directions("muon", [G], solver=precond.solvers.Eigen(power=0.25), **none)
    differ(two, polar(G))


def test_five_products_bring_singular_values_near_one_whatever_the_size_of_the_gradient() -> None:
    U, V = torch.linalg.qr(normal(12, 8))[0], torch.linalg.qr(normal(8, 8, seed=3))[0]
    s = torch.logspace(0, -2.5, 8, dtype=torch.float64)
    G = U @ torch.diag(s / s.norm()) @ V
    (step,) = directions("muon", [G], transforms=[])
    found = torch.linalg.svdvals(step)
    assert float(s.min() / s.norm()) > 1.5e-3 and 0.6 < float(found.min()) and float(found.max()) < 1.25
    (large,) = directions("muon", [1e6 * G], transforms=[])
    assert_close(large, step, rtol=1e-6, atol=1e-6)  # 1e-7 is added to the norm
    (three,) = directions("muon", [G], transforms=[], solver=precond.solvers.NewtonSchulz(power=0.5, coefficients="muon", steps=2))
    assert float(torch.linalg.svdvals(three).min()) < 0.3


@pytest.mark.parametrize("repr", ["diagonal", "kron_dim", "full", "layer_gram"])
def test_the_matrix_of_the_momentum(repr: str) -> None:
    """In every representation that is made of gradients; without a transform it is that of the gradient."""
    power = {"solver": "smw"} if repr == "layer_gram" else {"solver": EIGEN}
    gradients = [normal(3, 2, seed=t) for t in range(3)]
    options: dict[str, Any] = {"repr": repr, "damping": 0.1, "history": "local"} | power
    plain = directions("muon", gradients, **options | {"transforms": [], "matrix": "batched_empirical_fisher"})
    same = directions("muon", gradients, **options | {"transforms": [], "matrix": BatchedEmpiricalFisher(of="momentum")})
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    average = Momentum(0.5, debias=False)
    moved = directions("muon", gradients, **options | {"transforms": [average], "matrix": BatchedEmpiricalFisher(of="momentum")})
    m, made = torch.zeros(3, 2, dtype=torch.float64), []
    for G in gradients:
        m = 0.5 * m + 0.5 * G
        made.append(m)
    by_hand = directions("muon", made, **options | {"transforms": [], "matrix": "batched_empirical_fisher"})
    for a, b in zip(moved, by_hand, strict=True):
        assert_close(a, b, **EXACT)
    other = directions("muon", gradients, **options | {"transforms": [average], "matrix": "batched_empirical_fisher"})
    differ(other[-1], moved[-1])


def test_the_momentum_is_not_moved_twice_and_not_seen_before_it_may_be() -> None:
    gradients = [normal(3, 2, seed=t) for t in range(3)]
    average = [Momentum(0.5, debias=False)]
    options: dict[str, Any] = {"solver": EIGEN, "damping": 0.1, "transforms": average}
    once = directions("muon", gradients, **options)
    rarely = directions("muon", gradients, **options, curvature_interval=2)
    assert torch.equal(once[0], rarely[0]) and torch.equal(once[2], rarely[2])
    differ(once[1], rarely[1])
    waiting = directions("muon", [normal(3, 2, seed=9), *gradients], **options, start_step=1, before_start="nothing")
    assert_close(waiting[3], once[2], **EXACT)


def test_the_momentum_of_one_batch_is_its_gradient() -> None:
    model, x, y = seeded(lambda: nn.Linear(3, 4)), normal(5, 3), labels(4, 5)
    of = [curve(model, x, y, "kron_dim", matrix).to_dense() for matrix in (BatchedEmpiricalFisher(of="momentum"), "batched_empirical_fisher")]
    assert torch.equal(*of)


def test_a_parameter_without_a_gradient_has_a_momentum_of_zeros() -> None:
    model = Bare((2, 2), (2,))
    preconditioner = precond.recipe("muon", seed=0).attach(model)
    for t in range(2):
        model.give(*[torch.ones(2, 2).double(), torch.ones(2).double()][: t + 1])
        preconditioner.step()
    one = directions("muon", [0 * torch.ones(2).double(), torch.ones(2).double()])
    assert model.held[1].grad is not None
    assert_close(model.held[1].grad, one[1], **EXACT)


def test_a_list_of_parameters_is_a_model_too() -> None:
    model, gradient = nn.ParameterList([nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))]), normal(3, 2)
    preconditioner = precond.recipe("muon", seed=0).attach(model)
    model[0].grad = gradient.clone()
    preconditioner.step()
    assert torch.equal(model[0].grad, directions("muon", [gradient])[0])


def test_a_vector_is_read_as_a_column() -> None:
    g = normal(6)
    (step,) = directions("muon", [g], solver=EIGEN, damping=0.0, transforms=[])
    assert_close(step, g / g.norm(), **EXACT)
    assert KronDim(merge_dims="matrix").remark((6,)) == "(6) as 6 x 1"
    assert KronDim(merge_dims="matrix").remark((4, 2, 3)) == "(4, 2, 3) as 4 x 6"
    with pytest.raises(ValueError, match="choose 'gradient' or 'momentum'"):
        BatchedEmpiricalFisher(of="velocity")  # type: ignore[arg-type]


def test_a_step_in_proportion_to_the_shape() -> None:
    ones = {name: torch.ones(2).double() for name in ("tall", "wide", "vector", "kernel")}
    scene = Scene({}, {}, shapes={"tall": (8, 2), "wide": (2, 8), "vector": (9,), "kernel": (2, 3, 3)})
    spectral, rms = (ShapeScale(rule, 0.5).after({}, ones, {}, scene) for rule in ("spectral", "rms"))
    assert [float(d[0]) for d in spectral.values()] == [1.0, 0.5, 1.5, 0.5]
    assert [float(d[0]) for d in rms.values()] == [0.5 * 8**0.5, 0.5 * 8**0.5, 1.5, 1.5]
    assert ShapeScale().after({}, ones, {}, Scene({}, {}, started=False)) is ones
    for options, message in (({"rule": "size"}, "choose one of 'spectral', 'rms'"), ({"factor": 0.0}, "positive and finite")):
        with pytest.raises(ValueError, match=message):
            ShapeScale(**options)  # type: ignore[arg-type]
    model, x, y = seeded(lambda: nn.Linear(2, 8)), normal(4, 2), labels(8, 4)
    steps = []
    for transforms in ([], [ShapeScale()]):
        model.zero_grad()
        preconditioner = precond.recipe("kfac", seed=0, transforms=transforms).attach(model, criterion := nn.CrossEntropyLoss())
        criterion(model(x), y).backward()
        preconditioner.step()
        steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        preconditioner.remove()
    assert_close(steps[1], (8 / 3) ** 0.5 * steps[0], **EXACT)  # [W, b] has 3 columns


# --- TNT


def curve(model: nn.Module, x: Tensor, y: Tensor, repr: Any, matrix: Any = "empirical_fisher") -> Any:
    return precond.curvature(model, nn.CrossEntropyLoss(), x, y, matrix=matrix, repr=repr, seed=1)


def test_tnt_holds_a_rank_one_gradient_exactly_and_vectors_too() -> None:
    model, x, y = seeded(lambda: nn.Linear(3, 4)), normal(1, 3), labels(4, 1)
    trace = KronDim(normalisation="trace")
    U = dense.per_example_gradients(model, nn.CrossEntropyLoss(), x, y)[0]
    C = curve(model, x, y, trace)
    assert_close(C.blocks["weight"].to_dense(), torch.outer(U[:12], U[:12]), **EXACT)
    more, targets = normal(5, 3, seed=2), labels(4, 5)
    rows = dense.per_example_gradients(model, nn.CrossEntropyLoss(), more, targets)
    C = curve(model, more, targets, trace)
    assert_close(C.blocks["bias"].to_dense(), rows[:, 12:].T @ rows[:, 12:] / 5, **EXACT)
    differ(C.blocks["weight"].to_dense(), rows[:, :12].T @ rows[:, :12] / 5)
    g = rows[:, 12:]  # of a bias the gradient is g itself
    assert_close(C.blocks["weight"].factors[0].matrix, (more.square().sum(1)[:, None, None] * g[:, :, None] * g[:, None]).mean(0), **EXACT)


@pytest.mark.parametrize(("exponent", "scale"), [(1.0, 0.3), (0.5, 2.0)])
def test_balanced_factors_have_one_mean_trace_and_the_same_product(exponent: float, scale: float) -> None:
    B, A, d = (X @ X.T + torch.eye(len(X), dtype=X.dtype) for X in (normal(2, 2), 30 * normal(3, 3, seed=1), normal(4, 4, seed=2)))
    C = Kronecker(B, A, d.diagonal(), exponent=exponent, scale=scale)
    whole = PerFactor(0.0, balanced=True)(C)
    assert isinstance(whole, Kronecker)
    assert_close(whole.to_dense(), C.to_dense(), **EXACT)
    means = torch.stack([F.block_diagonals().mean() for F in whole.factors])
    assert_close(means, means[:1].expand(3), **EXACT)
    assert float(whole.scale) == 1.0
    c = means[0]
    parts = [dense_kron.power(c / torch.trace(F) * len(F) * F + 0.4 * torch.eye(len(F), dtype=F.dtype), exponent) for F in (B, A, d.diagonal().diag())]
    assert_close(PerFactor(0.4, balanced=True)(C).to_dense(), functools.reduce(torch.kron, parts), **EXACT)
    differ(PerFactor(0.4)(C).to_dense(), PerFactor(0.4, balanced=True)(C).to_dense())
    if exponent == 1:
        assert_close(Factored(0.4**3)(C).to_dense(), PerFactor(0.4, balanced=True)(C).to_dense(), **EXACT)


def test_balancing_a_stack_goes_by_product_and_leaves_what_has_no_trace() -> None:
    B, A = torch.stack([torch.eye(2), 4 * torch.eye(2), 0 * torch.eye(2)]).double(), torch.eye(3).double().expand(3, 3, 3)
    scale = torch.tensor([1.0, 9.0, 5.0], dtype=torch.float64)
    C = PerFactor(0.0, balanced=True)(Kronecker(B, A, scale=scale))
    assert_close(C.to_dense(), Kronecker(B, A, scale=scale).to_dense(), **EXACT)
    assert isinstance(C, Kronecker)
    assert_close(C.factors[1].block_diagonals().mean(-1), torch.tensor([1.0, 6.0, 1.0], dtype=torch.float64), **EXACT)


# --- Distributed Shampoo and CASPR


def path(recipe: str, net: str = "mlp", steps: int = 6, **arguments: Any) -> Tensor:
    network = NETWORKS[net]
    model, found = network.make(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with precond.recipe(recipe, seed=3, **arguments).attach(model, network.criterion, optimizer):
        for inputs, targets in network.batches(steps):
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            optimizer.step()
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(found)


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_distributed_shampoo_without_its_dressing_is_shampoo(net: str) -> None:
    plain: dict[str, Any] = {"transforms": [], "solver_interval": 1, "history": Sum()}
    bare = path("distributed_shampoo", net, start_step=0, damping=Floor(1e-3, policy="shift", factors=True), repr=KronDim(max_dim=1024), **plain)
    assert_close(bare, path("shampoo", net, history=Sum(1e-3)), **EXACT)  # eps in a sum: once, at the start
    differ(bare[-1], path("shampoo", net, history=Sum(1e-2))[-1])


def test_tiles_of_one_entry_are_adam() -> None:
    """Each factor is the average of the same square, to powers that multiply to -1/2."""
    ours = path("distributed_shampoo", start_step=0, solver_interval=1, damping=1e-12, repr=KronDim(max_dim=1), transforms=[Momentum(0.9)])
    theirs = path("adam", damping=1e-12)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert_close(path("adam"), theirs, rtol=1e-3, atol=1e-3)


def test_grafting_gives_the_step_the_norm_of_adams() -> None:
    gradients = [normal(3, 2, seed=t) for t in range(4)]
    options: dict[str, Any] = {"start_step": 2, "solver_interval": 1, "damping": PerFactor(1e-4)}
    for recipe in ("distributed_shampoo", "caspr"):
        steps = directions(recipe, gradients, **options)
        adam = directions(recipe, gradients, **options | {"start_step": 99})
        bare = directions(recipe, gradients, **options | {"transforms": [Momentum(0.9)]})
        for t in range(4):
            assert_close(steps[t].norm(), adam[t].norm(), **EXACT)
        assert torch.equal(steps[1], adam[1])
        differ(steps[2], adam[2])
        assert_close(steps[3] / steps[3].norm(), bare[3] / bare[3].norm(), **EXACT)
    sgd = directions("distributed_shampoo", gradients, **options | {"transforms": [Momentum(0.9), Graft("sgd")]})
    differ(sgd[3].norm(), steps[3].norm())


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2), (5,)])
def test_the_power_mean_over_the_axes(shape: tuple[int, ...]) -> None:
    gradients = [normal(*shape, seed=t) for t in range(6)]
    k = len(shape)
    preconditioner = precond.recipe("caspr", seed=0, repr=KronDim(normalisation="power"), history=Mean())
    fed(preconditioner, gradients, shape)
    factors = dense_kron.kron_dim(torch.stack(gradients), 1 / 6)
    eyes = [torch.eye(n, dtype=torch.float64) for n in shape]
    damped = [F + 1e-6 * eye for F, eye in zip(factors, eyes, strict=True)]
    total = sum(functools.reduce(torch.kron, [dense_kron.power(F, -0.5 / k) if j == m else eye for j, eye in enumerate(eyes)]) for m, F in enumerate(damped))
    assert isinstance(total, Tensor)
    C, block = preconditioner.operator(damped=True), preconditioner.operator()
    assert isinstance(block, KroneckerSum)
    assert_close(dense_kron.power(C.to_dense(), -0.5), torch.linalg.matrix_power(total / k, k), rtol=1e-8, atol=1e-8)
    shampoo = functools.reduce(torch.kron, [dense_kron.power(F, -0.5 / k) for F in damped])
    if k > 1:
        differ(dense_kron.power(C.to_dense(), -0.5), shampoo)
    else:
        assert_close(dense_kron.power(C.to_dense(), -0.5), shampoo, rtol=1e-8, atol=1e-8)


def test_the_power_mean_of_tiles_and_of_diagonal_axes() -> None:
    gradients = [normal(4, 5, seed=t) for t in range(6)]
    for options, pieces in (({"max_dim": 4}, [[4], [3, 2]]), ({"max_dim": 4, "oversized": "diagonal"}, [[4], [5]])):
        preconditioner = precond.recipe("caspr", seed=0, repr=KronDim(normalisation="power", **options), history=Mean())
        fed(preconditioner, gradients, (4, 5))
        block = preconditioner._known()[0].plan.block
        order = block.gather({block.names[0]: torch.arange(20).reshape(4, 5)})  # a tiled block is tile after tile
        C, expected = preconditioner.operator().to_dense(), torch.zeros(20, 20, dtype=torch.float64)
        for place in dense_kron.tiles([4, 5], pieces):
            L, R = dense_kron.kron_dim(torch.stack([G.flatten()[place] for G in gradients]), 1 / 6)
            R = R if len(pieces[1]) > 1 else R.diagonal().diag()
            eyes = [torch.eye(len(F), dtype=F.dtype) for F in (L, R)]
            mean = (torch.kron(dense_kron.power(L, -0.25), eyes[1]) + torch.kron(eyes[0], dense_kron.power(R, -0.25))) / 2
            where = place.flatten()
            expected[where.unsqueeze(1), where] = dense_kron.power(mean, -4.0)
        assert_close(C, expected[order][:, order], **EXACT)
    with pytest.raises(ValueError, match="a mean over all dimensions"):
        KronDim(normalisation="power", modes=(0,))
    with pytest.raises(InvalidCombination, match="takes Dense, Kronecker operators, but representation 'kron_dim' makes a KroneckerSum"):
        precond.recipe("caspr", solver="newton_schulz")


# --- KL-Shampoo


def test_kl_rests_where_the_normal_likelihood_of_the_gradients_is_largest() -> None:
    model, x, y = seeded(lambda: nn.Linear(3, 4, bias=False)), normal(40, 3), labels(4, 40)
    mixed = x * torch.tensor([1.0, 3.0, 0.3], dtype=torch.float64) + x.roll(1, 1)
    criterion = nn.MSELoss()
    target = normal(40, 4, seed=5) @ torch.diag(torch.tensor([0.2, 1.0, 2.0, 4.0], dtype=torch.float64)) + y[:, None]
    rows = dense.per_example_gradients(model, criterion, mixed, target).reshape(40, 4, 3)
    S = rows.flatten(1).T @ rows.flatten(1) / 40

    def settled(repr: KronDim, steps: int) -> Any:
        preconditioner = precond.Preconditioner(
            matrix="empirical_fisher", repr=repr, solver=EIGEN, damping=PerFactor(1e-9), history=Ema(0.5), seed=0
        ).attach(model, criterion)
        for _ in range(steps):
            model.zero_grad()
            criterion(model(mixed), target).backward()
            preconditioner.step()
        preconditioner.remove()
        return preconditioner.operator()

    def loss(C: Tensor) -> float:
        """Of the normal distribution with covariance C, best scaled: twice its negative log likelihood."""
        C = C * torch.trace(torch.linalg.solve(C, S)) / len(C)
        return float(torch.logdet(C) + torch.trace(torch.linalg.solve(C, S)))

    C = settled(KronDim(normalisation="kl", whiten_damping=0.0), 60)
    L, R = (F.matrix for F in C.factors)
    assert_close(L, (rows @ torch.linalg.inv(R) @ rows.mT).mean(0) / 3, rtol=1e-8, atol=1e-8)
    assert_close(R, (rows.mT @ torch.linalg.inv(L) @ rows).mean(0) / 4, rtol=1e-8, atol=1e-8)
    assert_close(torch.trace(torch.linalg.solve(C.to_dense(), S)), torch.tensor(12.0, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    others = [settled(KronDim(normalisation=name), 1).to_dense() for name in ("trace", "geometric")]
    early = settled(KronDim(normalisation="kl", whiten_damping=0.0, whiten_interval=99), 5).to_dense()
    assert loss(C.to_dense()) < min(map(loss, [*others, early])) - 1e-3


@pytest.mark.parametrize(
    ("options", "pieces", "form"),
    [
        ({"max_dim": 3}, [[3, 2], [2, 2]], "dense"),
        ({"max_dim": 4, "oversized": "diagonal"}, [[5], [4]], "diagonal"),
        ({"modes": (1,)}, [[5], [4]], "identity"),
    ],
)
def test_kl_whitens_tiles_and_other_forms_by_themselves(options: dict[str, Any], pieces: list[list[int]], form: str) -> None:
    """Two observations, the second of gradients that the damped first has whitened. form: that of the first dimension."""
    gradients = [normal(5, 4, seed=t) for t in range(2)]
    preconditioner = precond.recipe("kl_shampoo", seed=0, repr=KronDim(normalisation="kl", whiten_damping=0.1, **options), history="local")
    fed(preconditioner, gradients, (5, 4))
    block = preconditioner._known()[0].plan.block
    order = block.gather({block.names[0]: torch.arange(20).reshape(5, 4)})
    expected = torch.zeros(20, 20, dtype=torch.float64)
    for place in dense_kron.tiles([5, 4], pieces):
        G, H = (g.flatten()[place] for g in gradients)
        (rows, columns), where = G.shape, place.flatten()
        over, under = (torch.eye(n, dtype=G.dtype) for n in (rows, columns))
        L, R = dense_kron.restricted(G @ G.T / columns, form, []), G.T @ G / rows
        left = torch.linalg.inv(L + 0.1 * over) if form != "identity" else over
        L = dense_kron.restricted(H @ torch.linalg.inv(R + 0.1 * under) @ H.T / columns, form, [])
        expected[where.unsqueeze(1), where] = torch.kron(L.contiguous(), (H.T @ left @ H / rows).contiguous())
    assert_close(preconditioner.operator().to_dense(), expected[order][:, order], **EXACT)


def test_options_of_kl() -> None:
    preconditioner = precond.recipe("kl_shampoo", seed=0)
    fed(preconditioner, [normal(5, 4)], (5, 4))
    state = preconditioner._known()[0]
    assert state.plan.repr.bytes_held(state.plan.block, 8) == 2 * 8 * (25 + 16)
    for options, message in (({"whiten_interval": 0}, "at least 1"), ({"normalisation": "sum"}, "choose 'geometric' or 'trace' or 'power' or 'kl'")):
        with pytest.raises(ValueError, match=message):
            KronDim(**options)  # type: ignore[arg-type]


# --- INGD, SINGD, IKFAC


def test_singd_with_whole_blocks_is_ingd_and_smaller_ones_are_not() -> None:
    assert torch.equal(path("singd"), path("ingd"))
    small = precond.solvers.Riemannian(group="block", block=2, step=0.1)
    assert not torch.equal(path("singd", solver=small), path("ingd"))


def test_ikfac_on_one_batch_comes_to_rest_at_kfac() -> None:
    model, x, y = seeded(lambda: nn.Linear(3, 3)), normal(8, 3), labels(3, 8)
    criterion = nn.CrossEntropyLoss()

    def step(preconditioner: precond.Preconditioner, times: int) -> Tensor:
        with preconditioner.attach(model, criterion):
            for _ in range(times):
                model.zero_grad()
                criterion(model(x), y).backward()
                preconditioner.step()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    kfac = precond.recipe("kfac", matrix="empirical_fisher", damping=PerFactor(0.3), transforms=[], repr=KronIO(), seed=0)
    rested = step(precond.recipe("ikfac", damping=PerFactor(0.3), solver=precond.solvers.Riemannian(method="ikfac", step=0.5), seed=0), 60)
    assert_close(rested, step(kfac, 1), **EXACT)
    differ(step(precond.recipe("ikfac", damping=PerFactor(0.3), seed=0), 2), rested)
    assert isinstance(kfac.operator(), Kronecker) and isinstance(kfac.operator().factors[0], Dense)


# --- all of them


@pytest.mark.parametrize("name", ["muon", "kl_shampoo", "caspr", "distributed_shampoo", "tnt", "ingd", "ikfac"])
def test_a_run_that_is_saved_goes_on_as_it_was(name: str) -> None:
    network = NETWORKS["mlp"]
    model, early = network.make(), {"start_step": 1} if name in ("caspr", "distributed_shampoo") else {}
    first = precond.recipe(name, seed=3, **early).attach(model, network.criterion)

    def step(preconditioner: precond.Preconditioner, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        model.zero_grad()
        network.criterion(model(inputs), targets).backward()
        preconditioner.step()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    batches = network.batches(5)
    for inputs, targets in batches[:3]:
        step(first, inputs, targets)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    went_on = [step(first, *batch) for batch in batches[3:]]
    first.remove()
    second = precond.recipe(name, seed=4, **early)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.attach(model, network.criterion)
    for batch, expected in zip(batches[3:], went_on, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step(second, *batch), expected, strict=True))
