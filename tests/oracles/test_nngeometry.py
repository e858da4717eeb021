"""Claims against nngeometry 0.4, in float64 to 1e-10: the Fisher matrix, dense, by layers and by elements.

By classes, normal and Bernoulli outputs; in Linear, convolutions, LayerNorm, GroupNorm, and BatchNorm by running statistics (it has no
Embedding). Its normal has variance 1 where a mean squared error over K outputs stands for K / 2, and it does not divide Bernoulli terms
by K. Of K-FAC and EK-FAC it has the expansion, whose product is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from nngeometry.metrics import FIM
from nngeometry.object import PMatBlockDiag, PMatDense, PMatDiag, PMatEKFAC, PMatKFAC
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import precond
from nets import Case, labels, normal, seeded
from oracles.peers import NETS, close, in_double


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(16, 4), nn.LayerNorm(4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 3),
    ).eval()  # fmt: skip


def _conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))


def _transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3))


def _case(name: str, build: Callable[[], nn.Module], inputs: Tensor) -> Case:
    return Case(name, lambda: seeded(build), nn.CrossEntropyLoss(), inputs, labels(3, 4))


ALL = {name: NETS[name] for name in ("mlp-mean", "conv-mean", "mse-mean", "bce-mean")} | {
    case.name: case
    for case in (
        _case("norms", _norms, normal(4, 2, 6, 6)),
        _case("conv1d", _conv1d, normal(4, 2, 5)),
        _case("transposed", _transposed, normal(4, 2, 3, 3)),
    )
}


VARIANTS = {
    nn.CrossEntropyLoss: ("classif_logits", 1.0),
    nn.MSELoss: ("regression", 2 / 3),
    nn.BCEWithLogitsLoss: ("classif_binary_logits", 1 / 3),
}


def theirs(case: Case, kind: type) -> Tensor:
    """Its sum over J^T F J / N with F its own Fisher matrix of the output, in our constants."""
    model, (variant, constant) = case.make(), VARIANTS[type(case.criterion)]
    data = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=3)
    with in_double():
        F = FIM(model, data, kind, variant=variant)
        if kind is PMatEKFAC:
            F.update_diag(data)  # until then it is K-FAC
        return constant * F.to_torch()


def ours(case: Case, repr: str) -> Tensor:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix="fisher", repr=repr).to_dense()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("kind", "repr"), [(PMatDense, "full"), (PMatBlockDiag, "layer"), (PMatDiag, "diagonal")])
def test_the_fisher_matrix(kind: type, repr: str, name: str) -> None:
    close(ours(ALL[name], repr), theirs(ALL[name], kind))


@pytest.mark.parametrize("name", ["mlp-mean", "conv-mean", "mse-mean", "bce-mean"])
def test_kfac_and_ekfac(name: str) -> None:
    close(ours(ALL[name], "kron_io"), theirs(ALL[name], PMatKFAC))
    close(ours(ALL[name], "kron_eigen"), theirs(ALL[name], PMatEKFAC))


def test_blocks_differ() -> None:
    case = ALL["norms"]
    assert (ours(case, "layer") - theirs(case, PMatDense)).norm() > 0.1 * ours(case, "layer").norm()
