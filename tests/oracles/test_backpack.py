"""Claims against BackPACK 1.7.1, in float64 to 1e-10.

- Its gradients of single examples give our empirical Fisher matrix, by each layer it knows: convolutions of one and two dimensions,
  transposed and grouped ones, BatchNorm by running statistics, Embedding.
- Its diagonals of GGN and Hessian are ours.
- Its KFLR factors of a Linear are our K-FAC factors of the GGN. Of a convolution, its B is that of our reduction (it sums over
  positions) and its A the number of positions times that of our expansion (a sum as well): their product is neither of ours.
- Its KFRA factors of a Linear are those of `ggn_recursive`, and those of the GGN at the last layer, not at the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backpack import backpack, extend, extensions
from torch import Tensor, nn

import precond
from nets import Case, labels, normal, seeded
from oracles.peers import NETS, close, in_double
from precond.representations import KronIO

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning", "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)


def _net(name: str, inputs: Tensor, width: int, *layers: Callable[[], nn.Module]) -> Case:
    def build() -> nn.Module:
        return nn.Sequential(*(layer() for layer in layers), nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).eval()

    return Case(name, lambda: seeded(build), nn.CrossEntropyLoss(), inputs, labels(3, 4))


LAYERS = {
    case.name: case
    for case in (
        _net("conv1d", normal(4, 2, 5), 15, lambda: nn.Conv1d(2, 3, 3, padding=1)),
        _net("transposed", normal(4, 2, 3, 3), 50, lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)),
        _net("grouped", normal(4, 2, 4, 4), 16, lambda: nn.Conv2d(2, 4, 3, groups=2)),
        _net("embedding", labels(6, 4, 4, seed=6), 12, lambda: nn.Embedding(6, 3)),
        _net("batchnorm", normal(4, 4), 4, lambda: nn.Linear(4, 4), lambda: nn.BatchNorm1d(4)),
    )
}
NO_BCE = [name for name in NETS if not name.startswith("bce")]  # known for one output only
SECOND = [name for name in LAYERS if name not in ("embedding", "batchnorm")]  # the others have no Hessian there


def differentiated(case: Case, extension: Any) -> nn.Module:
    model = extend(case.make())
    criterion = extend(type(case.criterion)(reduction=case.criterion.reduction))
    with backpack(extension), in_double():
        criterion(model(case.inputs), case.targets).backward()
    return model


def ours(case: Case, matrix: str, repr: object) -> Any:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr)


def flat(model: nn.Module, name: str, start: int = 0) -> Tensor:
    return torch.cat([getattr(p, name).flatten(start) for p in model.parameters()], start)


@pytest.mark.parametrize("case", [*NETS.values(), *LAYERS.values()], ids=lambda case: case.name)
def test_gradients_of_single_examples(case: Case) -> None:
    G = flat(differentiated(case, extensions.BatchGrad()), "grad_batch", 1)  # of the loss as given: each divided by N for a mean
    N = len(G) if case.criterion.reduction == "mean" else 1
    close(ours(case, "empirical_fisher", "full").to_dense(), N * G.T @ G)
    close(ours(case, "empirical_fisher", "diagonal").diagonal(), N * G.square().sum(0))


@pytest.mark.parametrize("case", [*(NETS[name] for name in NO_BCE), *LAYERS.values()], ids=lambda case: case.name)
def test_the_diagonal_of_the_ggn(case: Case) -> None:
    close(ours(case, "ggn", "diagonal").diagonal(), flat(differentiated(case, extensions.DiagGGNExact()), "diag_ggn_exact"))


@pytest.mark.parametrize("case", [*(NETS[name] for name in NO_BCE), *(LAYERS[name] for name in SECOND)], ids=lambda case: case.name)
def test_the_diagonal_of_the_hessian(case: Case) -> None:
    close(ours(case, "hessian", "diagonal").diagonal(), flat(differentiated(case, extensions.DiagHessian()), "diag_h"))


def factors(C: Any, layer: str) -> tuple[Tensor, Tensor]:
    """(B, A) without the homogeneous 1, which BackPACK has not."""
    B, A = (factor.to_dense() for factor in C.blocks[layer].factors)
    return B, A[:-1, :-1]


@pytest.mark.parametrize("name", [name for name in NO_BCE if not name.startswith("conv")])
def test_kflr_of_linear_layers(name: str) -> None:
    model, C = differentiated(NETS[name], extensions.KFLR()), ours(NETS[name], "ggn", "kron_io")
    for layer in ("0", "2", "4"):
        module = model.get_submodule(layer)
        for got, want in zip(factors(C, layer), module.weight.kflr, strict=True):
            close(got, want)
        close(factors(C, layer)[0], module.bias.kflr[0])


def test_kflr_of_a_convolution_sums_positions_in_both_factors() -> None:
    case = NETS["conv-mean"]
    B, A = differentiated(case, extensions.KFLR()).get_submodule("0").weight.kflr
    close(factors(ours(case, "ggn", KronIO(sharing="reduce")), "0")[0], B)
    close(9 * factors(ours(case, "ggn", "kron_io"), "0")[1], A)


@pytest.mark.parametrize("name", [name for name in NO_BCE if not name.startswith("conv")])
def test_kfra_of_linear_layers(name: str) -> None:
    model, C = differentiated(NETS[name], extensions.KFRA()), ours(NETS[name], "ggn_recursive", "kron_io")
    for layer in ("0", "2", "4"):
        for got, want in zip(factors(C, layer), model.get_submodule(layer).weight.kfra, strict=True):
            close(got, want)
    exact = ours(NETS[name], "ggn", "kron_io")
    close(factors(C, "4")[0], factors(exact, "4")[0])
    assert (factors(C, "0")[0] - factors(exact, "0")[0]).norm() > 1e-3 * factors(exact, "0")[0].norm()
