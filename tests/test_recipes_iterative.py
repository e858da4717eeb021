"""What the recipes that solve by iteration claim, beside the steps of `test_recipes.py`.

* neumann: K terms without friction are K gradient-descent steps on the batch of a quadratic loss; with friction mu the limit is
  ((1 - mu) / eta I + mu H)^-1 g. lissa: on one batch the carried iterate is the partial sum by eigenvalues, and tends to (H + damping I)^-1 g.
* newton_cg: solved to the end it is Newton's method; energy and error in the norm of C fall with every iteration; negative curvature at once
  gives g, and is that of H + damping I; the tolerance is min(0.5, sqrt(|g|)); with the Armijo search it takes a power of 1/2 of the step.
* saddle_free_newton: leaves the saddle that Newton's method goes to; is Newton's method where H is definite; one solve in the whole space.
* ksd: the whole space gives the minimum of a quadratic; k dimensions without the previous direction are k iterations of CG; with it none is worse.
* curveball: from rest a Cauchy step; with fixed coefficients and frozen parameters the limit (GGN + (damping + (1 - rho) / beta) I)^-1 g; the damping is
  adapted when and as the reference does, both ways.
* psgd, psgd_kron: where the parameters rest, the learned preconditioner is H^-1; that of a layer without bias is a Kronecker product.
* `max_skew` decides which dimensions have a dense factor, for every method over dimensions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import dense_psgd
import nets
import precond
from precond.damping import Tikhonov
from precond.operators import Absolute, Dense, Fit, Pairs
from precond.representations import KronDim, KronEigen
from precond.solvers import CG, PSGD, Krylov, Neumann
from precond.transforms import Backtrack
from references import curveball, newton_cg
from references.common import NETWORKS, Drawn, Network, theta
from solver_grid import EXACT, conditioned, draw, eye

LINEAR = NETWORKS["linear"]


def run(recipe: str, network: Network, batches: list[Any], *, lr: float, closure: bool = False, **arguments: Any) -> tuple[Tensor, Tensor]:
    """theta and the direction after every step, each (steps, P)."""
    model = network.make()
    path, directions = [], []
    optimizer = precond.load_recipe(recipe).optimizer(model.parameters(), lr=lr)

    def evaluate(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = network.criterion(model(inputs), targets)
        loss.backward()
        return loss

    with precond.recipe(recipe, seed=3, **arguments).attach(model, network.criterion, optimizer):
        for inputs, targets in batches:
            if closure:
                optimizer.step(lambda inputs=inputs, targets=targets: evaluate(inputs, targets))
            else:
                evaluate(inputs, targets)
                optimizer.step()
            path.append(theta(model))
            directions.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
    return torch.stack(path), torch.stack(directions)


def frozen(recipe: str, steps: int, network: Network = LINEAR, **arguments: Any) -> Tensor:
    """The last direction of many steps on one batch that move nothing."""
    return run(recipe, network, [network.batch(0)] * steps, lr=0.0, **arguments)[1][-1]


def at_start(network: Network = LINEAR) -> tuple[Tensor, Tensor]:
    """H and g of the first batch."""
    model, batch = network.make(), network.batch(0)
    return dense.hessian(model, network.criterion, *batch), dense.gradient(model, network.criterion, *batch)


@pytest.mark.parametrize("steps", [2, 9])
def test_neumann_without_friction_is_gradient_descent_on_the_batch(steps: int) -> None:
    model, batch = LINEAR.make(), LINEAR.batch(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        LINEAR.criterion(model(batch[0]), batch[1]).backward()
        optimizer.step()
    ours, _ = run("neumann", LINEAR, [batch], lr=1.0, damping=0.0, solver=Neumann(terms=steps - 1, step_size=0.2))
    assert_close(ours[0], theta(model), **EXACT)
    other, _ = run("neumann", LINEAR, [batch], lr=1.0, damping=0.0, solver=Neumann(terms=steps, step_size=0.2))
    assert (other[0] - theta(model)).abs().max() > 1e-4  # negative: one term more


def test_neumann_with_friction_has_the_papers_limit() -> None:
    H, g = at_start()
    mu, eta = 0.9, 0.2
    d = frozen("neumann", 1, damping=(1 - mu) / (mu * eta), solver=Neumann(terms=300, step_size=mu * eta))
    assert_close(d / mu, torch.linalg.solve((1 - mu) / eta * eye(len(g)) + mu * H, g), **EXACT)


def test_lissa_is_a_partial_sum_and_tends_to_the_newton_direction() -> None:
    H, g = at_start()
    values, U = torch.linalg.eigh(H + 0.1 * eye(len(g)))
    for steps in (1, 4, 25):
        terms = (1 - 0.3 * values) ** torch.arange(steps + 1).unsqueeze(1)
        d = frozen("lissa", steps, solver=Neumann(terms=1, warm_start=1.0, step_size=0.3))
        assert_close(d, U @ (0.3 * terms.sum(0) * (U.T @ g)), **EXACT)
    exact = U @ ((U.T @ g) / values)
    errors = [(frozen("lissa", steps, solver=Neumann(terms=1, warm_start=1.0)) - exact).norm() for steps in (1, 12, 24)]
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_newton_cg_to_the_end_is_newtons_method() -> None:
    batches = LINEAR.batches(4)
    to_the_end = CG(tolerance=1e-14)
    ours, _ = run("newton_cg", LINEAR, batches, lr=1.0, damping=0.05, solver=to_the_end)
    newton, _ = run("newton", LINEAR, batches, lr=1.0, damping=0.05)
    assert_close(ours, newton, **EXACT)
    truncated, _ = run("newton_cg", LINEAR, batches, lr=1.0, damping=0.05)
    assert (truncated - newton).abs().max() > 1e-3  # negative: the recipe stops early


def test_energy_and_error_of_newton_cg_fall_with_every_iteration() -> None:
    C, b = conditioned(8, 20.0), draw(8)
    exact = torch.linalg.solve(C, b)
    found = [torch.zeros_like(b)]
    for k in range(1, 9):
        solver = CG(max_iterations=k, tolerance=0.0)
        found.append(solver.apply(solver.init(Dense(C), Tikhonov(0.0)), b)[0])
    errors = torch.stack([(x - exact) @ C @ (x - exact) for x in found])
    energies = torch.stack([x @ C @ x / 2 - b @ x for x in found])
    assert (errors.diff() < 0).all() and (energies.diff() < 0).all()
    assert_close(errors, 2 * energies + b @ exact, **EXACT)
    assert_close(found[-1], exact, **EXACT)


def test_negative_curvature_at_once_gives_the_gradient_and_is_that_of_the_damped_matrix() -> None:
    solver = precond.recipe("newton_cg").triple.solver
    C, b = Dense(torch.diag(torch.tensor([1.0, -3.0]).double())), torch.tensor([1.0, 2.0]).double()
    assert_close(solver.apply(solver.init(C, Tikhonov(0.3)), b)[0], b, **EXACT)
    solved, state = solver.apply(solver.init(C, Tikhonov(4.0)), b)
    assert state["residual"] <= 0.5 and (solved - b).norm() > 0.1


def test_the_tolerance_of_newton_cg_follows_the_gradient() -> None:
    C, b, counts = conditioned(12, 1e3), draw(12), []
    options = CG(tolerance=0.5, forcing="superlinear")
    for size in (10.0, 1e-2, 1e-4, 1e-8):
        small = size * b / b.norm()
        _, state = options.apply(options.init(Dense(C), Tikhonov(0.0)), small)
        enough = min(0.5, size**0.5)
        assert state["residual"] <= enough
        fewer = CG(tolerance=0.0, max_iterations=state["iterations"] - 1) if state["iterations"] > 1 else None
        if fewer is not None:
            assert fewer.apply(fewer.init(Dense(C), Tikhonov(0.0)), small)[1]["residual"] > enough
        counts.append(state["iterations"])
    assert counts == sorted(counts) and counts[-1] > counts[0]
    both = torch.stack([1e-8 * b / b.norm(), 10 * b / b.norm()], 1)  # each column has its own
    X, state = options.apply(options.init(Dense(C), Tikhonov(0.0)), both)
    assert state["iterations"] == counts[-1]
    for x, column in zip(X.T, both.T, strict=True):
        assert_close(x, options.apply(options.init(Dense(C), Tikhonov(0.0)), column)[0], **EXACT)
    with pytest.raises(ValueError, match="'superlinear'"):
        CG(forcing="quadratic")  # type: ignore[arg-type]


def test_the_armijo_search_takes_a_power_of_one_half_of_the_step_and_no_loss_rises() -> None:
    network, damping = NETWORKS["mlp"], 1e-2
    batches = network.batches(6)
    model, shares = network.make(), []
    path, _ = run("newton_cg", network, batches, lr=8.0, damping=damping, transforms=[Backtrack(decrease=1e-4, shrink=0.5)], closure=True)
    for at, batch in zip(path, batches, strict=True):
        before, loss = theta(model), network.criterion(model(batch[0]), batch[1]).item()
        moved_from = Network(lambda before=before: _at(network, before), network.criterion, network.batch)
        plain = 8.0 * (newton_cg.train(moved_from, [batch], Drawn(), damping=damping)[0] - before)
        share = float((at - before) @ plain / (plain @ plain))
        assert_close(at - before, share * plain, rtol=1e-9, atol=1e-10)
        shares.append(share)
        torch.nn.utils.vector_to_parameters(at, model.parameters())
        assert network.criterion(model(batch[0]), batch[1]).item() < loss
    assert all(min(abs(share - 0.5**k) for k in range(21)) < 1e-9 for share in shares)
    assert min(shares) < 1


def _at(network: Network, place: Tensor) -> nn.Module:
    model = network.make()
    torch.nn.utils.vector_to_parameters(place, model.parameters())
    return model


def test_saddle_free_newton_leaves_the_saddle_that_newtons_method_goes_to() -> None:
    # (w1 w2 - 1)^2 is 1 - 2 w1 w2 near 0: curvature 2 along (1, -1), -2 along (1, 1)
    def product() -> nn.Module:
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        torch.nn.utils.vector_to_parameters(torch.tensor([3e-7, 1e-7]).double(), model.parameters())
        return model

    one = torch.ones(1, 1, dtype=torch.float64)
    network = Network(product, nn.MSELoss(), lambda t: (one, one))
    start = theta(product())
    up, down = (torch.tensor([1.0, sign]).double() for sign in (1, -1))
    ours, _ = run("saddle_free_newton", network, network.batches(1), lr=1.0, damping=0.0)
    assert_close(ours[0] @ up, 2 * start @ up, rtol=1e-10, atol=0)
    assert_close(ours[0] @ down / (start @ down), torch.zeros(()).double(), rtol=0, atol=1e-10)
    newton, _ = run("newton", network, network.batches(1), lr=1.0, damping=0.0)
    assert_close(newton[0] / start, torch.zeros(2).double(), rtol=0, atol=1e-10)


def test_saddle_free_newton_in_the_whole_space_is_the_dense_one_and_newtons_where_h_is_definite() -> None:
    batches = LINEAR.batches(4)
    newton, _ = run("newton", LINEAR, batches, lr=0.5, damping=0.01)
    assert_close(run("saddle_free_newton", LINEAR, batches, lr=0.5)[0], newton, **EXACT)
    network = NETWORKS["square"]
    whole, _ = run("saddle_free_newton", network, network.batches(2), lr=0.1, solver=Krylov(steps=len(theta(network.make()))))
    exact, _ = run("saddle_free_newton", network, network.batches(2), lr=0.1, repr="full", solver="eigen")
    assert_close(whole, exact, **EXACT)
    signed, _ = run("newton", network, network.batches(2), lr=0.1, damping=0.01)
    assert (signed - exact).abs().max() > 1e-3  # negative: H of this network is indefinite
    C, b = torch.diag(torch.tensor([2.0, -2.0]).double()), torch.tensor([0.3, 0.7]).double()
    solver = precond.recipe("saddle_free_newton").triple.solver
    away = precond.inverse(Absolute(Dense(C)), solver=solver, damping=0.0) @ (C @ b)
    assert_close(away, torch.tensor([0.3, -0.7]).double(), **EXACT)  # theta - d = (0, 2 y)


def test_ksd_in_the_whole_space_lands_on_the_minimum() -> None:
    inputs, targets = LINEAR.batch(0)
    with_one = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    solution = torch.linalg.lstsq(with_one, targets).solution.T
    path, _ = run("ksd", LINEAR, LINEAR.batches(1), lr=1.0, damping=0.0)
    assert_close(path[0], torch.cat([solution[:, :-1].flatten(), solution[:, -1]]), **EXACT)


def test_ksd_without_the_previous_direction_is_cg_and_with_it_no_worse() -> None:
    A, B, b = conditioned(10, 1e2), conditioned(10, 1e2, seed=4), draw(10)
    plain, cg, widened = Krylov(steps=3), CG(max_iterations=3, tolerance=0.0), Krylov(steps=3, previous_direction=True)
    x, _ = plain.apply(plain.init(Dense(B), Tikhonov(0.1)), b)
    assert_close(x, cg.apply(cg.init(Dense(B), Tikhonov(0.1)), b)[0], **EXACT)
    _, state = widened.apply(widened.init(Dense(A), Tikhonov(0.1)), b)
    y, _ = widened.apply(widened.refresh(state, Dense(B), Tikhonov(0.1)), b)
    C = B + 0.1 * eye(10)
    energy = [float(z @ C @ z / 2 - b @ z) for z in (x, y)]
    assert energy[1] < energy[0] - 1e-6


def test_curveball_starts_with_a_cauchy_step_and_has_its_limit() -> None:
    H, g = at_start()  # of a linear model the GGN is H
    G = H + 0.1 * eye(len(g))
    assert_close(frozen("curveball", 1), (g @ g) / (g @ G @ g) * g, **EXACT)
    rho, beta = 0.5, 0.5
    solver = precond.solvers.HeavyBall(rho=rho, beta=beta)
    assert_close(frozen("curveball", 100, solver=solver), torch.linalg.solve(G + (1 - rho) / beta * eye(len(g)), g), **EXACT)
    assert_close(frozen("curveball", 30), torch.linalg.solve(G, g), rtol=1e-6, atol=1e-8)  # the best coefficients solve it


def test_the_damping_of_curveball_moves_when_and_as_the_reference_does() -> None:
    for variant, net in (("eager", "linear"), ("low", "mlp")):
        options, network = curveball.VARIANTS[variant][1], NETWORKS[net]
        batches = network.batches(curveball.STEPS)
        right = curveball.train(network, batches, Drawn(), **options)
        # one of them shrinks it and the other one lets it grow: without that bound nothing would change
        bound = {"upper": 1e9} if variant == "eager" else {"lower": -1e9}
        for other in ({"factor": 1.0}, {"first": 1, "every": 3}, bound):
            wrong = curveball.train(network, batches, Drawn(), **(options | other))
            assert (wrong - right).abs().max() > 1e-6
    damping = precond.recipe("curveball").triple.damping
    asked = [step for step in range(1, 17) if damping.asks({"steps": step - 1}) is not None]
    assert asked == [1, 6, 11, 16]
    with pytest.raises(ValueError, match="offset"):
        precond.damping.LevenbergMarquardt(1.0, every=5, offset=5)


def test_psgd_at_rest_learns_the_inverse() -> None:
    def layer() -> nn.Module:
        return nets.seeded(lambda: nn.Linear(3, 2, bias=False))

    network = Network(layer, nn.MSELoss(), LINEAR.batch)  # H = I (x) A
    H, g = at_start(network)
    for recipe in ("psgd", "psgd_kron"):
        errors = []
        for steps in (1, 100):
            d = frozen(recipe, steps, network, damping=0.0, solver=PSGD(update="Q0.5EQ1.5", step=0.5))
            errors.append(float((d - torch.linalg.solve(H, g)).norm()))
        assert errors[1] < errors[0] / 1000


def test_max_skew_decides_which_dimensions_have_a_dense_factor() -> None:
    model, batch = nets.seeded(lambda: nn.Sequential(nn.Linear(8, 3))), (draw(5, 8), draw(5, 3, seed=1))
    made = {
        skew: precond.curvature(
            model, nn.MSELoss(), *batch, matrix="batched_empirical_fisher", repr=KronDim(max_skew=skew, oversized="diagonal")
        )
        for skew in (None, 1.0, 3.0)
    }
    forms = {skew: [type(F).__name__ for F in C.blocks["0.weight"].factors] for skew, C in made.items()}
    assert forms[1.0] == ["Dense", "Diagonal"] and forms[3.0] == ["Dense", "Dense"] == forms[None]
    assert [type(F).__name__ for F in made[1.0].blocks["0.bias"].factors] == ["Diagonal"]
    assert [type(F).__name__ for F in made[3.0].blocks["0.bias"].factors] == ["Dense"]
    g = dense.gradient(model, nn.MSELoss(), *batch)[:24].reshape(3, 8)
    left, right = g @ g.T, (g.T @ g).diagonal().diag()

    def root(M: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(M)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    assert_close(made[1.0].blocks["0.weight"].to_dense(), torch.kron(root(left), root(right)), **EXACT)
    eigen = KronEigen(basis_of="dim", max_dim=3)
    assert eigen.remark((3, 8)) is not None
    with pytest.raises(ValueError, match="oversized='diagonal' or 'identity'"):
        KronDim(max_skew=1.0)
    with pytest.raises(ValueError, match="above 0"):
        KronDim(max_skew=0.0, oversized="diagonal")


@pytest.mark.parametrize("pairs", [1, 2, 40])
def test_the_triangular_update_of_few_pairs_is_that_of_many(pairs: int) -> None:
    v, h, fit = draw(pairs, 20), draw(pairs, 20, seed=1), Fit((20,), ("dense",))
    solver = PSGD(initial=0.8)
    state = solver.init(Pairs(v, h, fit), Tikhonov(0.0))
    Q, _ = dense_psgd.modes([0.8 * eye(20)], ("dense",), [0.0], v, h, step=0.1)
    assert_close(state["Q"]["0"][0], Q[0], **EXACT)
    later = solver.refresh(state, Pairs(h, v, fit), Tikhonov(0.0))["Q"]["0"][0]
    assert torch.equal(later, later.triu()) and later.diagonal().min() > 0
