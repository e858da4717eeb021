"""What the recipes of diagonal Hessians and of secant pairs claim: the identities of their papers, exact to 1e-10 in float64.

- AdaHessian and equilibrated SGD: on a diagonal Hessian h, D = |h| whatever the signs drawn; D is the norm of the rows of H on average over
  directions, so that the rows of D^-1 H have norm 1; without a power AdaHessian is Adam without its denominator.
- Sophia: entries of negative curvature move by the sign of the momentum, those of large curvature by Newton's step; h of Sophia-G is the
  diagonal of the Fisher matrix on average over labels.
- BFGS: H y = s; with exact line searches on a quadratic of n variables B is its Hessian after n steps. L-BFGS that forgets nothing and
  starts from the same matrix is BFGS, Powell's damping included.
- K-BFGS: one layer under half the squared error has y = s, so that H_g stays I; H_a A v = v along its last step. K-BFGS(L) that forgets nothing
  is K-BFGS.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from nets import labels, normal, seeded
from precond.damping import Floor, Outside, PerFactor
from precond.history import Ema
from precond.likelihoods import Categorical
from precond.transforms import ElementClip, Momentum, Rescale
from references.common import NETWORKS, theta

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
MSE = nn.MSELoss()
Loop = Callable[[nn.Module], Tensor]


def column() -> nn.Module:
    """One input and no bias: the squared error is separate in the weights, so that its Hessian is diagonal."""
    return seeded(lambda: nn.Linear(1, 4, bias=False))


X, T = normal(6, 1, seed=1), normal(6, 4, seed=2)


def train(name: str, model: nn.Module, loss: Loop, steps: int = 1, lr: float | None = None, **arguments: Any) -> tuple[Tensor, precond.Preconditioner]:
    """(steps, P) theta after every step, and the preconditioner."""
    optimizer = precond.load_recipe(name).optimizer(model.parameters(), **({} if lr is None else {"lr": lr}))
    preconditioner = precond.recipe(name, seed=0, **arguments).attach(model, MSE, optimizer)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        path.append(theta(model))
    return torch.stack(path), preconditioner


def walk(name: str, net: str = "mlp", lr: float = 0.3, steps: int = 8, **arguments: Any) -> Tensor:
    """(steps, P): theta along the batches of a network."""
    network = NETWORKS[net]
    model, path = network.make(), []
    optimizer = precond.load_recipe(name).optimizer(model.parameters(), lr=lr)
    with precond.recipe(name, seed=0, **arguments).attach(model, network.criterion, optimizer):
        for inputs, targets in network.batches(steps):
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            optimizer.step()
            path.append(theta(model))
    return torch.stack(path)


def squared(model: nn.Module) -> Tensor:
    found: Tensor = MSE(model(X), T)
    return found


def changed(name: str, axis: str, **options: Any) -> Any:
    """The recipe's own member with other options."""
    return dataclasses.replace(getattr(precond.recipe(name).triple, axis), **options)


# -- diagonals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "eps", "more"), [("adahessian", 1e-4, {}), ("equilibrated_sgd", 0.03, {"repr": {"distribution": "rademacher"}})])
def test_on_a_diagonal_hessian_the_first_step_divides_by_its_absolute_value(name: str, eps: float, more: dict[str, Any]) -> None:
    model = column()
    h, g, start = dense.hessian(model, MSE, X, T), dense.gradient(model, MSE, X, T), theta(model)
    close(h, h.diagonal().diag())
    arguments = {axis: changed(name, axis, **options) for axis, options in more.items()}
    path, _ = train(name, model, squared, lr=1.0, **arguments)
    close(path[0], start - g / (h.diagonal().abs() + eps))
    if more:
        assert (train(name, column(), squared, lr=1.0)[0][0] - path[0]).norm() > 1e-3  # normal directions know |h| on average only


def test_without_a_power_adahessian_is_adam_without_its_denominator() -> None:
    network = NETWORKS["square"]
    model, expected = network.make(), []
    at, m = theta(model), torch.zeros_like(theta(model))
    for t, batch in enumerate(network.batches(4), start=1):
        m = 0.9 * m + 0.1 * dense.gradient(model, network.criterion, *batch)
        at = at - 0.1 * m / (1 - 0.9**t)
        torch.nn.utils.vector_to_parameters(at, model.parameters())
        expected.append(at)
    powerless = walk("adahessian", "square", lr=0.1, steps=4, solver=changed("adahessian", "solver", power=1e-15), damping=Outside(0.0))  # |h|^k = 1 to 1e-13
    close(powerless, torch.stack(expected))
    assert (walk("adahessian", "square", lr=0.1, steps=4) - torch.stack(expected)).abs().max() > 1e-3


def test_equilibration_divides_by_the_norms_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 4)))
    H, P = dense.hessian(model, MSE, X, T), len(theta(model))
    g, start = dense.gradient(model, MSE, X, T), theta(model)
    probes = importlib.import_module("precond.observe.probes")
    own = probes._draw

    def unit(like: Any, distribution: Any, samples: int, key: Any) -> Any:
        """The P unit vectors times sqrt(P), whose second moment is I."""
        drawn, start = {}, 0
        eye = P**0.5 * torch.eye(P, dtype=torch.float64)
        for name, v in own(like, distribution, samples, key).items():
            drawn[name] = eye[:, start : start + v[0].numel()].reshape(v.shape)
            start += v[0].numel()
        return drawn

    monkeypatch.setattr(probes, "_draw", unit)
    path, preconditioner = train("equilibrated_sgd", model, squared, lr=1.0, repr=changed("equilibrated_sgd", "repr", samples=P))
    D = torch.cat([operator.diagonal() for operator in preconditioner.operators.values()])
    close(D, (H @ H).diagonal().sqrt())
    close((H / D.unsqueeze(1)).norm(dim=1), torch.ones(P, dtype=torch.float64))
    close(path[0], start - g / (D + 0.03))
    assert ((H / H.diagonal().abs().unsqueeze(1)).norm(dim=1) - 1).abs().max() > 0.1  # Jacobi's diagonal does not


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
@pytest.mark.parametrize("sign", [1, -1])
def test_sophia_takes_newtons_step_where_curvature_is_large_and_signs_where_it_is_negative(name: str, sign: int) -> None:
    model = column()
    h, g, start = dense.hessian(model, MSE, X, T).diagonal(), dense.gradient(model, MSE, X, T), theta(model)
    options: dict[str, Any] = {
        "matrix": "hessian", "repr": precond.representations.Diagonal(estimator="hutchinson"),  # signs: h itself
        "history": Ema(0.0, debias=False), "loss_weights": "given", "damping": Floor(1e-12),
        "transforms": [Momentum(0.0, debias=False), Rescale(0.5), ElementClip(10.0)],
    }  # fmt: skip
    path, _ = train(name, model, lambda model: sign * squared(model), lr=0.5, **options)
    step = g / (2 * h) if sign == 1 else -10 * g.sign()
    close(path[0], start - 0.5 * step)
    if sign == -1:
        gentle, _ = train(name, column(), lambda model: sign * squared(model), lr=0.5, **(options | {"transforms": [Momentum(0.0), ElementClip()]}))
        close(gentle[0], start + 0.5 * g.sign())


def test_the_diagonal_of_sophia_g_is_that_of_the_fisher_matrix_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion, x, y = seeded(lambda: nn.Linear(2, 3)), nn.CrossEntropyLoss(), normal(2, 2, seed=3), labels(3, 2)
    p = dense.predict(model, x).softmax(1)
    matrix, repr = precond.recipe("sophia_g").triple.matrix, precond.recipe("sophia_g").triple.repr
    fisher = dense.fisher(model, criterion, x, y).diagonal()
    expectation, uniform = torch.zeros_like(fisher), torch.zeros_like(fisher)
    for drawn in itertools.product(range(3), repeat=2):
        monkeypatch.setattr(Categorical, "sample", lambda self, output, target, generator, d=drawn: self.gradient(output, torch.tensor(d)))
        h = precond.curvature(model, criterion, x, y, matrix=matrix, repr=repr).diagonal()
        expectation = expectation + float(p[0, drawn[0]] * p[1, drawn[1]]) * h
        uniform = uniform + h / 9
    close(expectation, fisher)
    assert (uniform - fisher).norm() > 1e-3 * fisher.norm()


# -- secant pairs ----------------------------------------------------------------------------------------------------------


def regression(n: int) -> tuple[nn.Module, Loop]:
    x, t = normal(3 * n, n, seed=5) * torch.arange(1.0, n + 1, dtype=torch.float64), normal(3 * n, 1, seed=6)
    return seeded(lambda: nn.Linear(n, 1, bias=False)), lambda model: MSE(model(x), t)


def searched(name: str, n: int, steps: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """B after some steps of exact length on a quadratic, its Hessian, and the pairs."""
    model, loss = regression(n)
    start = theta(model)
    Q: Tensor = torch.autograd.functional.hessian(lambda w: loss(lambda x: x @ w.T), start.unsqueeze(0)).view(n, n)  # type: ignore[arg-type]
    optimizer = precond.load_recipe(name).optimizer(model.parameters())
    preconditioner = precond.recipe(name, matrix=changed(name, "matrix", powell=0.0)).attach(model, MSE, optimizer)
    gradient = torch.zeros(n, dtype=torch.float64)

    def exact(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        d = next(model.parameters()).grad.flatten()  # type: ignore[union-attr]
        optimizer.param_groups[0]["lr"] = float(gradient @ d / (d @ Q @ d))

    optimizer.register_step_pre_hook(exact)
    path = [start]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        gradient.copy_(next(model.parameters()).grad.flatten())  # type: ignore[union-attr]
        optimizer.step()
        path.append(theta(model))
    pairs = [(b - a, Q @ (b - a)) for a, b in itertools.pairwise(path)]
    return preconditioner.operators["model"].to_dense(), Q, pairs


@pytest.mark.parametrize("name", ["bfgs", "lbfgs"])
def test_b_satisfies_the_last_pair_and_with_exact_line_searches_all_of_them(name: str) -> None:
    B, _, pairs = searched(name, 6, 4)
    for s, y in pairs:
        torch.testing.assert_close(B @ s, y, rtol=1e-8, atol=1e-8)  # by conjugacy, which holds to rounding times the condition of Q
    close(B @ pairs[-1][0], pairs[-1][1])
    assert (torch.eye(6, dtype=torch.float64) @ pairs[-1][0] - pairs[-1][1]).norm() > 0.1 * pairs[-1][1].norm()


@pytest.mark.parametrize("name", ["bfgs", "lbfgs"])
def test_after_n_exact_line_searches_b_is_the_hessian(name: str) -> None:
    B, Q, _ = searched(name, 4, 4)
    torch.testing.assert_close(B, Q, rtol=1e-7, atol=1e-7)
    early, _, _ = searched(name, 4, 3)
    assert (early - Q).norm() > 1e-2 * Q.norm()


@pytest.mark.parametrize("scale", [True, False])
def test_lbfgs_that_forgets_nothing_is_bfgs(scale: bool) -> None:
    options: dict[str, Any] = {"powell": 0.8, "scale_initial": scale}  # a rule that this path meets
    reference = walk("bfgs", matrix=changed("bfgs", "matrix", **options))
    limited = partial(walk, "lbfgs", matrix=changed("lbfgs", "matrix", **options))
    close(limited(repr=changed("lbfgs", "repr", scaling="none")), reference)
    assert (limited(repr=changed("lbfgs", "repr", scaling="none", memory=4)) - reference).abs().max() > 1e-6
    assert (walk("bfgs", matrix=changed("bfgs", "matrix", **options | {"powell": 0.0})) - reference).abs().max() > 1e-6


def test_kbfgs_of_all_pairs_is_kbfgs() -> None:
    reference = walk("kbfgs")
    close(walk("kbfgs_l"), reference)
    assert (walk("kbfgs_l", repr=changed("kbfgs_l", "repr", memory=3)) - reference).abs().max() > 1e-6


def test_under_half_the_squared_error_the_output_factor_of_kbfgs_stays_the_identity() -> None:
    x, t = normal(12, 3, seed=1), normal(12, 2, seed=2)  # MSELoss over two outputs is half the squared error

    def path(**options: Any) -> Tensor:
        model = seeded(lambda: nn.Linear(3, 2))
        return train("kbfgs", model, lambda model: MSE(model(x), t), steps=5, matrix=changed("kbfgs", "matrix", **options))[0]

    unmoved = path(skip=1e9)  # no pair counts
    close(path(), unmoved)
    assert (path(second="add") - unmoved).abs().max() > 1e-4


def test_the_input_factor_of_kbfgs_is_inverted_along_its_last_step() -> None:
    x, t = normal(12, 3, seed=1), normal(12, 2, seed=2)
    model = seeded(lambda: nn.Linear(3, 2))
    _, preconditioner = train("kbfgs", model, lambda model: MSE(model(x), t), steps=3)
    (name,) = preconditioner.operators
    A_LM = PerFactor(0.3, only=(1,))(preconditioner.operators[name]).factors[1].to_dense()  # type: ignore[attr-defined]
    mean = torch.cat([x.mean(0), torch.ones(1, dtype=x.dtype)])
    solver = preconditioner.state_dict()["blocks"][name]["state"]["factors"]
    H_a = solver["1"]["inverse"]
    close(H_a @ A_LM @ (H_a @ mean), H_a @ mean)


def test_only_row_norms_have_a_power_of_an_indefinite_matrix() -> None:
    half: dict[str, Any] = {"matrix": "hessian", "solver": precond.solvers.Elementwise(power=0.5), "damping": Outside(1e-4)}
    precond.Preconditioner(repr=precond.representations.Diagonal(estimator="row_norms"), **half)
    with pytest.raises(precond.InvalidCombination, match="indefinite"):
        precond.Preconditioner(repr=precond.representations.Diagonal(estimator="hutchinson"), **half)
