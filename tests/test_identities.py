"""Identities of matrices and representations that hold exactly (float64, 1e-10), each with a case in which it does not.

Numbers are those of the list of identities: 1 (GGN == Fisher), 2 (Hessian == GGN by layer), 12 (symmetry, definiteness, rank), 13 (slices),
14 and 15 (where K-FAC is exact). 8 and 9 are in test_curvature_batches, 20 and 21 in test_identities_layers, 29 to 31 in
test_identities_training, 32 in test_curvature_purity.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from nets import CASES, Case, labels, normal, seeded
from pairs import LEFT, OF_A_BATCH, exactly, valid
from precond import matrices
from precond.representations import KronIO

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def curve(case: Case, matrix: Any, repr: Any) -> Any:
    model = case.make()
    return precond.curvature(model, case.criterion, case.inputs, case.targets, matrix=exactly(matrix, repr, model), repr=repr, seed=3)


def apart(a: Tensor, b: Tensor) -> bool:
    """Not equal by far: more than a thousandth."""
    return bool((a - b).norm() > 1e-3 * b.norm())


def case(build: Any, criterion: nn.Module, x: Tensor, y: Tensor) -> Case:
    return Case("here", lambda: seeded(build), criterion, x, y)


# -- 1, 2, 12, 13 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "mse", "mse_sum", "bce", "transformer_ignore", "lstm"])
def test_1_the_ggn_is_the_fisher_matrix_by_enumerated_labels(name: str) -> None:
    C = CASES[name]
    want = dense.fisher(C.make(), C.criterion, C.inputs, C.targets)
    close(curve(C, "ggn", "full").to_dense(), want)
    close(curve(C, "fisher", "full").to_dense(), want)
    assert apart(curve(C, "empirical_fisher", "full").to_dense(), want)


def test_1_with_squares_it_is_the_jacobian_times_itself_and_not_with_another_loss() -> None:
    C = CASES["mse"]
    J, (N, K) = dense.jacobian(C.make(), C.inputs), C.targets.shape
    close(curve(C, "ggn", "full").to_dense(), 2 / (N * K) * J.T @ J)
    huber = nn.HuberLoss(delta=0.5)
    assert apart(dense.ggn(C.make(), huber, C.inputs, C.targets), curve(C, "fisher", "full").to_dense())
    with pytest.raises(precond.ObservationError, match="HuberLoss"):
        precond.curvature(C.make(), huber, C.inputs, C.targets, matrix="fisher", repr="full")


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_2_blocks_of_a_piecewise_linear_net_have_the_same_hessian_and_ggn(name: str) -> None:
    close(curve(CASES[name], "hessian", "layer").to_dense(), curve(CASES[name], "ggn", "layer").to_dense())
    assert apart(curve(CASES[name], "hessian", "full").to_dense(), curve(CASES[name], "ggn", "full").to_dense())


@pytest.mark.parametrize("name", ["mse", "transformer", "reused", "mha"])
def test_2_not_with_smooth_activations_norms_ties_and_repeated_layers(name: str) -> None:
    assert apart(curve(CASES[name], "hessian", "layer").to_dense(), curve(CASES[name], "ggn", "layer").to_dense())


@pytest.mark.parametrize(
    ("matrix", "repr"), [(m, r) for m in OF_A_BATCH for r in ("full", "layer", "unit", "diagonal") if valid(m, r)]
)
@pytest.mark.parametrize("name", ["mlp", "mse", "bce"])
def test_12_symmetric_and_all_but_the_hessian_semi_definite(name: str, matrix: str, repr: str) -> None:
    M = curve(CASES[name], matrix, repr).to_dense()
    close(M, M.T)
    lowest = torch.linalg.eigvalsh(M).min()
    if matrices.get(matrix)().definite:
        assert lowest > -1e-12
    elif repr == "full":
        assert lowest < -1e-3, "the control: a Hessian away from a minimum is indefinite"


def test_12_ranks_are_bounded_by_examples_and_outputs() -> None:
    def rank(name: str, matrix: str) -> int:
        return int(torch.linalg.matrix_rank(curve(CASES[name], matrix, "full").to_dense(), rtol=1e-10, hermitian=True))

    N, C, K = 6, 3, 2
    assert rank("mlp", "batched_empirical_fisher") == 1
    assert rank("mlp", "empirical_fisher") <= N and rank("mlp", "fisher_mc") <= N
    assert rank("mse", "empirical_fisher") == N and rank("mse", "fisher_mc") == N
    assert rank("mse", "ggn") == N * K
    assert N < rank("mlp", "ggn") <= N * (C - 1)
    assert rank("mlp", "hessian") > N * (C - 1)


LINEAR = [m for m in OF_A_BATCH if m not in ("abs_hessian", "input_second_moment", "ggn_recursive")]


@pytest.mark.parametrize("matrix", LINEAR)
@pytest.mark.parametrize("name", ["mlp", "conv", "transformer", "lstm"])
def test_13_blocks_are_slices_of_the_whole(name: str, matrix: str) -> None:
    model = CASES[name].make()
    M = curve(CASES[name], matrix, "full").to_dense()
    close(curve(CASES[name], matrix, "matrix_free").to_dense(), M)
    layer, unit, diagonal = (curve(CASES[name], matrix, repr).to_dense() for repr in ("layer", "unit", "diagonal"))
    close(layer, dense.project_layer(M, model))
    close(unit, dense.project_unit(M, model))
    close(diagonal, M.diagonal().diag())
    assert apart(layer, M) and apart(unit, layer) and apart(diagonal, unit)


@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize("name", ["mlp", "conv", "transformer", "lstm"])
def test_13_moments_of_inputs_are_the_same_by_model_layer_and_unit(name: str) -> None:
    model = CASES[name].make()
    M = curve(CASES[name], "input_second_moment", "full").to_dense()
    for repr in ("layer", "unit", "kron_io"):
        close(curve(CASES[name], "input_second_moment", repr).to_dense(), M)
    close(dense.project_unit(M, model), M)
    assert apart(M.diagonal().diag(), M)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_13_absolute_values_of_blocks_are_not_blocks_of_the_absolute_value(name: str) -> None:
    model, M = CASES[name].make(), curve(CASES[name], "abs_hessian", "full").to_dense()
    layer, unit, diagonal = (curve(CASES[name], "abs_hessian", repr).to_dense() for repr in ("layer", "unit", "diagonal"))
    assert (
        apart(layer, dense.project_layer(M, model)) and apart(unit, dense.project_unit(M, model)) and apart(diagonal, M.diagonal().diag())
    )
    close(dense.project_layer(layer, model), layer)
    close(dense.project_unit(unit, model), unit)


# -- 14, 15 ------------------------------------------------------------------------------------------------------------


def kron_and_exact(C: Case, sharing: Any = "expand") -> tuple[Tensor, Tensor]:
    return curve(C, "ggn", KronIO(sharing=sharing)).to_dense(), curve(C, "ggn", "layer").to_dense()


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2))


def test_14_kfac_is_exact_on_a_deep_linear_net_with_squares() -> None:
    close(*kron_and_exact(case(deep_linear, MSE, normal(6, 4), normal(6, 2))))
    assert apart(*kron_and_exact(case(deep_linear, CE, normal(6, 4), labels(2, 6))))


@pytest.mark.parametrize("name", ["mlp", "mse", "mse_sum", "bce"])
def test_14_kfac_is_exact_on_one_example_and_on_one_input_repeated(name: str) -> None:
    C = CASES[name]
    close(*kron_and_exact(Case(name, C.make, C.criterion, C.inputs[:1], C.targets[:1])))
    close(*kron_and_exact(Case(name, C.make, C.criterion, C.inputs[:1].repeat(6, 1), C.targets)))
    assert apart(*kron_and_exact(C))


def test_14_the_last_layer_with_squares_is_exact_and_the_first_is_not() -> None:
    kron, exact = curve(CASES["mse"], "ggn", "kron_io").blocks, curve(CASES["mse"], "ggn", "layer")
    where = dense.joint_indices(CASES["mse"].make(), "2")
    close(kron["2"].to_dense(), exact.to_dense()[where][:, where])
    where = dense.joint_indices(CASES["mse"].make(), "0")
    assert apart(kron["0"].to_dense(), exact.to_dense()[where][:, where])


class Pool(nn.Module):
    """The mean over the given dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class Last(nn.Module):
    """Channels to the end, so that a term is one location."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class Halves(nn.Module):
    """One Linear on each half of the input, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x[:, :3]), self.layer(x[:, 3:])], 1)


TOKENS, IMAGES = normal(4, 5, 4), normal(3, 2, 5, 5)


def conv(*after: nn.Module) -> Any:
    return lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), *after)


def test_15_expand_is_exact_with_outputs_at_each_position() -> None:
    close(*kron_and_exact(case(deep_linear, MSE, TOKENS, normal(4, 5, 2))))
    close(*kron_and_exact(case(conv(Last()), MSE, IMAGES, normal(3, 4, 4, 4))))
    close(*kron_and_exact(case(Halves, MSE, normal(1, 6), normal(1, 4))))


def test_15_expand_is_not_exact_after_pooling_or_with_cross_entropy() -> None:
    pooled = lambda: nn.Sequential(deep_linear(), Pool(1))  # noqa: E731
    assert apart(*kron_and_exact(case(pooled, MSE, TOKENS, normal(4, 2))))
    assert apart(*kron_and_exact(case(conv(Pool(2, 3)), MSE, IMAGES, normal(3, 4))))
    per_token = lambda: nn.Sequential(deep_linear(), Last())  # noqa: E731
    assert apart(*kron_and_exact(case(per_token, CE, TOKENS[:1], labels(2, 1, 5))))


def test_15_reduce_is_exact_after_pooling() -> None:
    pooled = lambda: nn.Sequential(deep_linear(), Pool(1))  # noqa: E731
    close(*kron_and_exact(case(pooled, MSE, TOKENS, normal(4, 2)), "reduce"))
    close(*kron_and_exact(case(pooled, CE, TOKENS[:1], labels(2, 1)), "reduce"))
    close(*kron_and_exact(case(conv(Pool(2, 3)), MSE, IMAGES, normal(3, 4)), "reduce"))


def test_15_reduce_is_not_exact_without_pooling_or_with_cross_entropy() -> None:
    pooled = lambda: nn.Sequential(deep_linear(), Pool(1))  # noqa: E731
    assert apart(*kron_and_exact(case(deep_linear, MSE, TOKENS, normal(4, 5, 2)), "reduce"))
    assert apart(*kron_and_exact(case(pooled, CE, TOKENS, labels(2, 4)), "reduce"))
