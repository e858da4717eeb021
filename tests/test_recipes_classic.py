"""Identities of the recipes of Newton, natural gradients, K-FAC and its kin, and of gradient moments (float64, 1e-10), beside the steps of `test_recipes.py`.

- newton: one step to the minimum of any definite quadratic. On one layer under a squared error newton, layer_wise_newton, natural_gradient, kflr and,
  with two outputs, foof are one step; not on two layers.
- natural_gradient: the exact Fisher's is the GGN's; layer_wise_ng of one layer is it; of the empirical Fisher it is SENG's without a sketch.
- hessian_free: of linear least squares it is at the minimum after as many iterations as H has eigenvalues; every direction descends.
- kflr: exact for a linear network under a squared error. Its B is the mean of K-FAC's over all labels. kfra: kflr for a linear network and for one example.
- kfac: of one example the empirical Fisher's blocks are exact; sampled labels that are the true ones make it the empirical Fisher's. ekfac: of one
  example K-FAC with exact damping, and with the products of the factors' eigenvalues for its diagonal K-FAC's matrix.
- unit_wise_ng: with one output layer_wise_ng; where all gradients of an output are one, its blocks are B_oo A.
- foof: without damping each of fewer independent inputs than entries has its output moved by its own gradient.
- adagrad, rmsprop, adam: torch's with other options too; adam's first step is the sign. In the full matrix the first step of adagrad is normalised, a
  gradient of one entry a step makes it the diagonal one, and it turns with the basis.
- diagonal_ng: of one example g / (g^2 + l); with the exact Fisher the diagonal of the GGN.
- shampoo: one step is the polar factor over the singular values that are not 0; a vector has full-matrix AdaGrad; Loewner's bound.
- soap without bases is Adam after the step that it skips. fang: all parents make the natural gradient, none diagonal_ng, those of a unit unit_wise_ng.

Elsewhere: affine maps around K-FAC's layers in `test_identities_invariance.py`; where K-FAC is exact, and blocks that are slices of others, in
`test_identities.py`; the trace and error of EK-FAC in `test_kron_eigen.py`; one-sided Shampoo in `test_kron_dim.py`; rho of an exact quadratic in
`test_levenberg_marquardt.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import precond
from nets import labels, normal, seeded
from precond import solvers
from precond.damping import Outside, Tikhonov
from precond.history import Sum
from precond.matrices import FisherMC
from precond.representations import FullSparse, KronEigen, KronIO
from references.common import NETWORKS, Batch, Network, theta

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
MLP, LINEAR, SQUARE = NETWORKS["mlp"], NETWORKS["linear"], NETWORKS["square"]
DEEP = Network(
    lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))),
    nn.MSELoss(),
    lambda t: (normal(8, 4, seed=10 + t), normal(8, 2, seed=50 + t)),
)
ONE = Network(MLP.make, MLP.criterion, lambda t: (normal(1, 4, seed=10 + t), labels(3, 1, seed=50 + t)))
HEAD = Network(lambda: seeded(lambda: nn.Linear(4, 3)), nn.CrossEntropyLoss(), MLP.batch)
PLAIN: dict[str, Any] = {"transforms": [], "history": "local", "curvature_interval": 1, "solver_interval": 1, "start_step": 0}
"""What is left of a recipe is its triple."""


def run(recipe: str, network: Network, batches: list[Batch], *, lr: float = 0.0, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(theta after, gradient, direction) of every step, each (steps, P)."""
    model = network.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    path: list[list[Tensor]] = [[], [], []]
    with precond.recipe(recipe, seed=3, **arguments).attach(model, network.criterion, optimizer):
        for inputs, targets in batches:
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            path[1].append(_grad(model))
            optimizer.step()
            path[2].append(_grad(model))
            path[0].append(theta(model))
    return torch.stack(path[0]), torch.stack(path[1]), torch.stack(path[2])


def _grad(model: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.clone()).flatten() for p in dense.parameters(model)])


def step(recipe: str, network: Network, **arguments: Any) -> Tensor:
    """(P,): the direction of the first batch by a recipe's triple."""
    return run(recipe, network, network.batches(1), **PLAIN | arguments)[2][0]


def apart(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * b.norm())


# -- Newton and Hessian-free -----------------------------------------------------------------------------------------------


def test_newton_is_at_the_minimum_of_any_quadratic_in_one_step() -> None:
    R, y = normal(5, 5) + 3 * torch.eye(5, dtype=torch.float64), normal(1, 5, seed=2)

    def make() -> nn.Module:
        model = seeded(lambda: nn.Sequential(nn.Linear(1, 5, bias=False), nn.Linear(5, 5, bias=False)))
        model[1].weight.data.copy_(R)
        model[1].requires_grad_(False)
        return model

    quadratic = Network(make, nn.MSELoss(), lambda t: (torch.ones(1, 1, dtype=y.dtype), y))
    for recipe in ("newton", "layer_wise_newton"):
        after = run(recipe, quadratic, quadratic.batches(1), lr=1.0, damping=0.0)[0][0]
        assert_close(after, torch.linalg.solve(R, y[0]), **EXACT)
    assert apart(run("newton", quadratic, quadratic.batches(1), lr=1.0)[0][0], torch.linalg.solve(R, y[0]))


def test_on_one_layer_under_a_squared_error_five_recipes_are_newtons() -> None:
    newton = step("newton", LINEAR, damping=0.0)
    for recipe in ("layer_wise_newton", "natural_gradient", "layer_wise_ng", "kflr", "foof"):
        assert_close(step(recipe, LINEAR, damping=0.0), newton, **EXACT)
    two = step("newton", SQUARE, damping=0.1)
    for recipe in ("layer_wise_newton", "natural_gradient", "kflr", "foof"):
        assert apart(step(recipe, SQUARE, damping=0.1), two)


def test_hessian_free_ends_with_the_eigenvalues_of_least_squares() -> None:
    inputs, targets = LINEAR.batch(0)
    with_one = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    solution = torch.linalg.lstsq(with_one, targets).solution.T
    minimum = torch.cat([solution[:, :-1].flatten(), solution[:, -1]])
    for iterations, there in ((4, True), (3, False)):  # H = I (x) A has four eigenvalues
        solver = solvers.CG(max_iterations=iterations, tolerance=0.0)
        after = run("hessian_free", LINEAR, LINEAR.batches(1), lr=1.0, damping=0.0, solver=solver)[0][0]
        assert ((after - minimum).norm() < 1e-10 * minimum.norm()) == there
    _, gradients, directions = run("hessian_free", MLP, MLP.batches(8), lr=0.5)
    assert ((gradients * directions).sum(1) > 0).all()


# -- natural gradients -----------------------------------------------------------------------------------------------------


def test_natural_gradients_of_one_matrix_or_one_layer_are_one() -> None:
    exact = step("natural_gradient", MLP)
    assert_close(step("natural_gradient", MLP, matrix="ggn"), exact, **EXACT)
    assert apart(step("natural_gradient", MLP, matrix="empirical_fisher"), exact)
    assert_close(step("layer_wise_ng", HEAD), step("natural_gradient", HEAD), **EXACT)
    assert apart(step("layer_wise_ng", MLP), exact)
    layers = step("layer_wise_ng", MLP, matrix="empirical_fisher", damping=0.1)
    assert_close(step("seng", MLP), layers, **EXACT)
    assert apart(step("layer_wise_ng", MLP, damping=0.1), layers)


def test_unit_wise_with_one_output_is_layer_wise() -> None:
    one = Network(lambda: seeded(lambda: nn.Linear(4, 1)), nn.MSELoss(), lambda t: (normal(8, 4), normal(8, 1, seed=1)))
    assert_close(step("unit_wise_ng", one, matrix="fisher"), step("layer_wise_ng", one), **EXACT)
    assert apart(step("unit_wise_ng", HEAD, matrix="fisher"), step("layer_wise_ng", HEAD))


def test_where_gradients_are_one_unit_blocks_are_those_of_kfac() -> None:
    model, (inputs, targets) = LINEAR.make(), LINEAR.batch(0)
    A = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    A = A.T @ A / len(A)
    for goal, same in ((model(inputs).detach() - torch.tensor([0.5, -2.0]), True), (targets, False)):
        data = {"matrix": "empirical_fisher", "repr": "unit"}
        C = precond.curvature(model, nn.MSELoss(), inputs, goal, **data).to_dense()
        squares = (model(inputs) - goal).detach().square().mean(0)  # of MSELoss over 2 outputs
        for o in (0, 1):
            where = torch.tensor([3 * o, 3 * o + 1, 3 * o + 2, 6 + o])
            assert torch.allclose(C[where][:, where], squares[o] * A, rtol=1e-10, atol=1e-10) == same


def test_the_diagonal_of_one_example_is_the_squared_gradient() -> None:
    _, gradients, directions = run("diagonal_ng", ONE, ONE.batches(1), **PLAIN, matrix="empirical_fisher", damping=0.1)
    assert_close(directions[0], gradients[0] / (gradients[0] ** 2 + 0.1), **EXACT)
    model, batch = MLP.make(), MLP.batch(0)
    gradient, diagonal = dense.gradient(model, MLP.criterion, *batch), dense.ggn(model, MLP.criterion, *batch).diagonal()
    exact = step("diagonal_ng", MLP, matrix="fisher", damping=0.1)
    assert_close(exact, gradient / (diagonal + 0.1), **EXACT)
    assert apart(step("diagonal_ng", MLP, damping=0.1), exact)


def test_foof_moves_outputs_by_their_gradients_where_inputs_are_few() -> None:
    few = Network(lambda: seeded(lambda: nn.Linear(9, 2, bias=False)), nn.MSELoss(), lambda t: (normal(4, 9), normal(4, 2, seed=1)))
    (inputs, targets), model = few.batch(0), few.make()
    wanted = (model(inputs) - targets).detach()  # d/doutput of the term mean over 2 outputs
    moved = [inputs @ step("foof", few, damping=damping).view(2, 9).T for damping in (1e-9, 0.1)]
    assert_close(moved[0], wanted, rtol=1e-7, atol=1e-7)  # damping / the smallest eigenvalue of A that is not 0
    assert apart(moved[1], wanted)


@pytest.mark.parametrize(
    ("recipe", "repr"),
    [("natural_gradient", FullSparse(form="precision", pattern="band", width=64)), ("diagonal_ng", FullSparse(form="precision", pattern="diagonal")),
     ("unit_wise_ng", FullSparse(form="precision", pattern="unit"))],
)  # fmt: skip
def test_fang_by_its_parents_is_another_recipe(recipe: str, repr: FullSparse) -> None:
    other = step(recipe, MLP, matrix="fisher", damping=0.01)
    assert_close(step("fang", MLP, matrix="fisher", repr=repr), other, **EXACT)
    assert apart(step("fang", MLP, matrix="fisher"), other)


# -- K-FAC and its kin -----------------------------------------------------------------------------------------------------


def test_kflr_of_a_linear_network_is_exact_and_kfra_is_kflr() -> None:
    exact = {"solver": "eigen", "damping": Tikhonov(0.1)}
    blocks = step("layer_wise_ng", DEEP, matrix="ggn", damping=0.1)
    assert_close(step("kflr", DEEP, **exact), blocks, **EXACT)
    assert_close(step("kfra", DEEP, **exact), blocks, **EXACT)
    assert_close(step("kfra", ONE), step("kflr", ONE), **EXACT)
    assert apart(step("kflr", MLP, **exact), step("layer_wise_ng", MLP, matrix="ggn", damping=0.1))
    assert apart(step("kfra", MLP), step("kflr", MLP))


def factors(matrix: Any, inputs: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    """[B, A of each layer in turn] of the network of `MLP`."""
    C = precond.curvature(MLP.make(), MLP.criterion, inputs, targets, matrix=matrix, repr="kron_io", **options)
    return [factor.to_dense() for block in C.blocks.values() for factor in block.factors]


def test_the_output_factor_of_kflr_is_the_mean_of_sampled_ones() -> None:
    inputs = MLP.batch(0)[0][:2]
    p = dense.predict(MLP.make(), inputs).softmax(1)
    mean = [torch.zeros_like(F) for F in factors("ggn", inputs, labels(3, 2))]
    uniform = [torch.zeros_like(F) for F in mean]
    for pair in itertools.product(range(3), repeat=2):
        sampled = factors("empirical_fisher", inputs, torch.tensor(pair))  # the Fisher matrix of labels that were drawn
        for total, even, F in zip(mean, uniform, sampled, strict=True):
            total += p[0, pair[0]] * p[1, pair[1]] * F
            even += F / 9
    exact = factors("ggn", inputs, labels(3, 2))
    for F, total in zip(exact, mean, strict=True):
        assert_close(total, F, **EXACT)
    assert any(apart(even, F) for F, even in zip(exact, uniform, strict=True))


def test_kfac_whose_labels_are_the_true_ones_is_that_of_the_empirical_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    original: Callable[..., Tensor] = FisherMC.cotangents

    def noted(self: Any, context: Any) -> Tensor:
        cotangents = original(self, context)
        drawn.append(cotangents[0].argmin(1))
        return cotangents

    monkeypatch.setattr(FisherMC, "cotangents", noted)
    inputs, targets = MLP.batch(0)
    sampled = factors("fisher_mc", inputs, targets, seed=3)
    for F, same in zip(sampled, factors("empirical_fisher", inputs, drawn[0]), strict=True):
        assert_close(F, same, **EXACT)
    assert any(apart(F, other) for F, other in zip(sampled, factors("empirical_fisher", inputs, targets), strict=True))


def test_of_one_example_kfac_and_ekfac_are_exact() -> None:
    exact = step("layer_wise_ng", ONE, matrix="empirical_fisher", damping=0.1)
    assert_close(step("kfac", ONE, matrix="empirical_fisher", solver="eigen", damping=Tikhonov(0.1)), exact, **EXACT)
    assert_close(step("ekfac", ONE, damping=0.1), exact, **EXACT)
    assert apart(step("ekfac", MLP, damping=0.1), step("kfac", MLP, matrix="empirical_fisher", solver="eigen", damping=Tikhonov(0.1)))


def test_ekfac_with_products_of_eigenvalues_is_kfac() -> None:
    data = (MLP.make(), MLP.criterion, *MLP.batch(0))
    kfac = precond.curvature(*data, matrix="empirical_fisher", repr=KronIO())
    ekfac = precond.curvature(*data, matrix="empirical_fisher", repr=KronEigen())
    for name, block in ekfac.blocks.items():
        held = kfac.blocks[name].to_dense()
        outer = torch.einsum("bi,bj->bij", *[
            torch.einsum("bij,bik,bkj->bj", U, F.to_dense().unsqueeze(0), U) for U, F in zip(block.bases, kfac.blocks[name].factors, strict=True)
        ])  # fmt: skip
        assert_close(precond.operators.KroneckerEigen(block.bases, outer).to_dense(), held, **EXACT)
        assert apart(block.to_dense(), held)


# -- moments of the gradient -----------------------------------------------------------------------------------------------


def test_the_first_step_of_adam_is_the_sign() -> None:
    _, gradients, directions = run("adam", MLP, MLP.batches(1), damping=Outside(1e-14))
    seen = gradients[0].abs() > 1e-3
    assert seen.sum() > 20
    assert_close(directions[0][seen], gradients[0][seen].sign(), **EXACT)
    _, gradients, directions = run("rmsprop", MLP, MLP.batches(1))
    assert apart(directions[0][seen], gradients[0][seen].sign())  # its average is not corrected


def test_momentum_of_rmsprop_is_that_of_the_outer_update() -> None:
    paths = []
    for stock in (True, False):
        model = MLP.make()
        if stock:
            optimizer: torch.optim.Optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0)
        else:
            optimizer = precond.load_recipe("rmsprop").optimizer(model.parameters(), momentum=0.9)
            precond.recipe("rmsprop").attach(model, MLP.criterion, optimizer)
        for inputs, targets in MLP.batches(10):
            optimizer.zero_grad()
            MLP.criterion(model(inputs), targets).backward()
            optimizer.step()
        paths.append(theta(model))
    assert_close(paths[0], paths[1], rtol=1e-12, atol=1e-12)


FULL: dict[str, Any] = {"repr": "full", "solver": solvers.Eigen(power=0.5)}


def test_the_first_step_of_full_adagrad_is_normalised() -> None:
    _, gradients, directions = run("adagrad", MLP, MLP.batches(1), **FULL, damping=1e-8)
    assert_close(directions[0], gradients[0] / (gradients[0].norm() ** 2 + 1e-8).sqrt(), **EXACT)
    assert_close(directions[0], gradients[0] / gradients[0].norm(), rtol=1e-6, atol=1e-6)
    assert apart(run("adagrad", MLP, MLP.batches(1))[2][0], directions[0])


def test_full_adagrad_of_one_entry_a_step_is_the_diagonal() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    axes = Network(
        lambda: seeded(lambda: nn.Linear(4, 1, bias=False)), nn.MSELoss(), lambda t: (eye[[t * t % 4]], normal(1, 1, seed=t))
    )  # fmt: skip
    for network, same in ((axes, True), (MLP, False)):
        batches = network.batches(6)
        full = run("adagrad", network, batches, lr=0.1, damping=1e-6, **FULL)[0]
        diagonal = run("adagrad", network, batches, lr=0.1, damping=Tikhonov(1e-6))[0]
        assert torch.allclose(full, diagonal, rtol=1e-10, atol=1e-10) == same


def test_full_adagrad_turns_with_the_basis_and_the_diagonal_does_not() -> None:
    Q = torch.linalg.qr(normal(4, 4))[0]
    ends: dict[str, list[Tensor]] = {"full": [], "diagonal": []}
    for turn in (torch.eye(4, dtype=Q.dtype), Q):

        def make(turn: Tensor = turn) -> nn.Module:
            model = seeded(lambda: nn.Linear(4, 1, bias=False))
            model.weight.data.copy_(model.weight @ turn)
            return model

        network = Network(make, nn.MSELoss(), lambda t, turn=turn: (normal(3, 4, seed=t) @ turn, normal(3, 1, seed=9 + t)))
        for kind, options in (("full", FULL), ("diagonal", {})):
            ends[kind].append(run("adagrad", network, network.batches(6), lr=0.1, damping=Tikhonov(1e-4), **options)[0] @ turn.T)
    assert_close(ends["full"][0], ends["full"][1], **EXACT)
    assert apart(ends["diagonal"][0], ends["diagonal"][1])


def test_one_step_of_shampoo_is_the_polar_factor_and_a_vectors_is_normalised() -> None:
    network = Network(lambda: seeded(lambda: nn.Linear(4, 5)), nn.CrossEntropyLoss(), lambda t: (normal(8, 4), labels(5, 8)))
    rank_one = Network(network.make, network.criterion, lambda t: (normal(1, 4), labels(5, 1)))
    for of, rank in ((network, 4), (rank_one, 1)):
        _, gradients, directions = run("shampoo", of, of.batches(1), history=Sum(initial=1e-8))
        G, bias = gradients[0][:20].view(5, 4), gradients[0][20:]
        U, S, V = torch.linalg.svd(G, full_matrices=False)
        assert (S > 1e-10 * S[0]).sum() == rank
        assert_close(directions[0][:20].view(5, 4), U * (S / (S**2 + 1e-8).sqrt()) @ V, **EXACT)
        assert_close(directions[0][:20].view(5, 4), U[:, :rank] @ V[:rank], rtol=1e-4, atol=1e-4)
        assert_close(directions[0][20:], bias / (bias.norm() ** 2 + 1e-8).sqrt(), **EXACT)
        assert apart(directions[0], gradients[0])


def test_the_product_of_shampoos_factors_bounds_the_sum_of_squares() -> None:
    network = Network(SQUARE.make, SQUARE.criterion, lambda t: (normal(1, 3, seed=10 + t), normal(1, 3, seed=50 + t)))
    model, total, initial = network.make(), torch.zeros(9, 9, dtype=torch.float64), 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = precond.recipe("shampoo", history=Sum(initial=initial))
    with preconditioner.attach(model, network.criterion, optimizer):
        for inputs, targets in network.batches(6):
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            g = model[0].weight.grad.flatten().clone()
            total += torch.outer(g, g)
            optimizer.step()
            product = preconditioner.operators["0.weight"].to_dense()
            bound = initial * torch.eye(9, dtype=g.dtype) + total  # gradients of one example have rank 1
            assert torch.linalg.eigvalsh(product - bound).min() > -1e-10 * product.norm()
    assert torch.linalg.eigvalsh(product - 2 * bound).min() < -1e-3 * product.norm()  # not by as much as a factor of 2


def test_soap_without_bases_is_adam_after_the_step_that_it_skips() -> None:
    rate, batches = 0.01, MLP.batches(12)
    repr = KronEigen(basis_of="dim", update="after", max_dim=0)
    ours = run("soap", MLP, batches, lr=rate, repr=repr)[0]
    model = MLP.make()
    assert torch.equal(ours[0], theta(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.95, 0.95), eps=1e-8)
    path = []
    for inputs, targets in batches[1:]:
        optimizer.zero_grad()
        MLP.criterion(model(inputs), targets).backward()
        optimizer.step()
        path.append(theta(model))
    assert_close(ours[1:], torch.stack(path), **EXACT)
    assert apart(run("soap", SQUARE, SQUARE.batches(4), lr=rate)[0], run("soap", SQUARE, SQUARE.batches(4), lr=rate, repr=repr)[0])
