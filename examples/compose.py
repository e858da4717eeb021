"""Three preconditioners that no paper names, each composed from parts, trained on real digits beside SGD.

    pip install '.[demo]'
    python examples/compose.py

Prints the loss over the training set after the same number of steps, the best of five learning rates for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import precond

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def gauss_newton_of_units_under_a_root() -> precond.Preconditioner:
    """Each output unit's block of the exact Gauss-Newton matrix, to the power -1/2: as cautious as Adam, and not diagonal."""
    return precond.Preconditioner(
        matrix="ggn", repr="unit", solver=precond.solvers.Eigen(power=0.5), damping=1e-3, history=0.9, curvature_interval=10
    )


def noise_in_the_basis_of_kfac() -> precond.Preconditioner:
    """What examples disagree on: the covariance of their gradients, to the power -1/2, in the eigenbasis of K-FAC's factors."""
    return precond.Preconditioner(
        matrix="gradient_covariance", repr=precond.representations.KronEigen(basis_of="io", basis_interval=10),
        solver=precond.solvers.Elementwise(power=0.5), damping=1e-4, history=0.95,
    )  # fmt: skip


def sampled_fisher_by_dimensions_without_decompositions() -> precond.Preconditioner:
    """Shampoo's factors, of gradients at labels drawn from the model; their fourth roots by products of matrices alone."""
    return precond.Preconditioner(
        matrix="batched_fisher_mc", repr="kron_dim", solver=precond.solvers.NewtonSchulz(power=0.5), damping=1e-3, history=0.95, solver_interval=10
    )


COMPOSED = (gauss_newton_of_units_under_a_root, noise_in_the_basis_of_kfac, sampled_fisher_by_dimensions_without_decompositions)


def train(make: Callable[[], precond.Preconditioner] | None, lr: float, steps: int, inputs: Tensor, targets: Tensor) -> float:
    """The loss over all examples after `steps` of the ordinary loop, infinite where it diverged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if make is not None:
        make().attach(model, criterion, optimizer)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        criterion(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(criterion(model(inputs), targets))
    return loss if loss == loss else float("inf")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train all, print the table, return the losses by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(arguments).steps
    torch.set_num_threads(1)  # the blocks are small: a second thread costs more than it brings
    pixels, classes = load_digits(return_X_y=True)
    inputs, targets = torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(classes)

    losses: dict[str, float] = {}
    table = Table("method", "cell", "loss", "learning rate")
    for make in track((None, *COMPOSED), description="training"):
        loss, rate = min((train(make, lr, steps, inputs, targets), lr) for lr in RATES)
        name = "sgd" if make is None else make.__name__
        losses[name] = loss
        triple = None if make is None else make().triple
        cell = "" if triple is None else f"{triple.matrix.name} x {triple.repr.name} x {triple.solver.name}"
        table.add_row(name.replace("_", " "), cell, f"{loss:.3g}", f"{rate:g}")
    Console().print(table)
    return losses


if __name__ == "__main__":
    main()
