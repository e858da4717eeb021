"""Claims about every layer inside a network, float64 at 1e-10: layer x representation x matrix against the dense oracle.

- The GGN and the empirical Fisher matrix, whole, by unit, by element and by dimension of each tensor, are projections of the oracle's;
  K-FAC is that of the oracle's plain loops, expand and reduce, EK-FAC has the exact diagonal in its basis, or both the fallback that the
  oracle says.
- Every parameter that is trained has a block, and the self-check of a training step accepts the layer.
- A rule by family exists for every family of the table in `docs/layers.md`, and each has a case.
"""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import dense_derived
import dense_kron
import precond
from layer_cases import ATTENTION, CONVOLUTIONS, EMBEDDINGS, LAYERS, OTHERS, TRANSPOSED
from nets import Case
from precond.layers.registration import _RULES
from precond.representations import KronIO

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
MATRICES = ("ggn", "empirical_fisher")
every_case = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
every_matrix = pytest.mark.parametrize("matrix", MATRICES)


@functools.cache
def _oracle(name: str, matrix: str) -> Tensor:
    case = LAYERS[name]
    return getattr(dense, matrix)(case.make(), case.criterion, case.inputs, case.targets)


@pytest.fixture(autouse=True)
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_cells, "whole", lambda case, matrix, sampled=None: _oracle(case.name, matrix))


def curve(case: Case, matrix: str, repr: object) -> precond.operators.Operator:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr)


@every_matrix
@pytest.mark.parametrize("repr", ["full", "unit", "diagonal"])
@every_case
def test_a_layer_has_the_oracles_matrix(case: Case, repr: str, matrix: str) -> None:
    M, model = _oracle(case.name, matrix), case.make()
    project = {"full": lambda: M, "unit": lambda: dense.project_unit(M, model), "diagonal": lambda: dense.project_diagonal(M)}
    close(curve(case, matrix, repr).to_dense(), project[repr]())
    assert all(M[place].diagonal().abs().max() > 0 for place in _own(model, M))


def _own(model: nn.Module, M: Tensor) -> list[slice]:
    """Where the parameters of the layer under test are; the key's bias moves no attention weight and is left out."""
    return [place for name, place in dense.positions(model).items() if not name.startswith("3") and "bias_k" not in name]


@every_matrix
@every_case
def test_a_layer_has_the_oracles_kronecker_factors(case: Case, matrix: str) -> None:
    close(curve(case, matrix, "kron_io").to_dense(), dense_cells.kron_io(case, matrix))


@pytest.mark.parametrize("case", CONVOLUTIONS + TRANSPOSED + EMBEDDINGS[:1] + ATTENTION + OTHERS, ids=lambda case: case.name)
def test_a_layer_has_the_oracles_spectrum_in_the_basis_of_its_factors(case: Case) -> None:
    close(curve(case, "ggn", "kron_eigen").to_dense(), dense_cells.kron_io(case, "ggn", corrected=True))


@pytest.mark.parametrize("case", CONVOLUTIONS + TRANSPOSED + ATTENTION + OTHERS, ids=lambda case: case.name)
def test_a_layer_has_the_oracles_reduced_factors(case: Case) -> None:
    close(curve(case, "ggn", KronIO(sharing="reduce")).to_dense(), dense_cells.kron_io(case, "ggn", sharing="reduce"))


@pytest.mark.parametrize("repr", ["layer", "unit", "kron_io"])
@pytest.mark.parametrize("case", [*CONVOLUTIONS, LAYERS["hf"], LAYERS["lora"]], ids=lambda case: case.name)
def test_a_layer_has_the_oracles_moment_of_inputs(case: Case, repr: str) -> None:
    close(curve(case, "input_second_moment", repr).to_dense(), dense_derived.input_second_moment(case.make(), None, case.inputs))


@every_case
def test_a_layer_has_the_oracles_factors_by_dimension(case: Case) -> None:
    model = case.make()
    rows = dense.per_example_gradients(model, case.criterion, case.inputs, case.targets)
    blocks = curve(case, "empirical_fisher", "kron_dim").blocks
    for name, part in dense.split(rows, model).items():
        want = dense_kron.kron_dim(part, 1 / len(rows)) if part.dim() > 1 else [(part.square().sum() / len(rows)).view(1, 1)]
        for factor, expected in zip(blocks[name].factors, want, strict=True):
            close(factor.to_dense(), expected)


@every_case
def test_a_layer_trains_with_the_self_check(case: Case) -> None:
    model = case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = precond.Preconditioner(matrix="empirical_fisher", repr="kron_io", solver="cholesky", damping=1e-2)
    preconditioner.attach(model, case.criterion, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    case.criterion(model(case.inputs), case.targets).backward()
    optimizer.step()
    described = preconditioner.describe().rows
    assert [row.parameter for row in described if row.block == "-"] == []
    moved = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert moved >= {row.parameter for row in described if "bias_k" not in row.parameter}


def test_every_family_has_a_case() -> None:
    seen = {type(m) for case in LAYERS.values() for m in case.make().modules()}
    assert set(_RULES) <= seen | {nn.Conv2d, nn.Linear, nn.Embedding}


def test_every_layer_that_is_promised_has_a_case() -> None:
    modules = [m for case in LAYERS.values() for m in case.make().modules()]
    promised = {
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
        nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Embedding, nn.EmbeddingBag,
        nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN, nn.ParameterList, nn.ParameterDict, nn.Bilinear, nn.PReLU,
    }  # fmt: skip
    assert promised <= {type(m) for m in modules}
    convolutions = [m for m in modules if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not isinstance(m, nn.modules.conv._ConvTransposeNd)]
    for kind in (nn.Conv1d, nn.Conv3d):
        assert {m.padding_mode for m in convolutions if isinstance(m, kind)} == {"zeros", "reflect", "replicate", "circular"}
    assert {m.padding for m in convolutions if isinstance(m.padding, str)} == {"same", "valid"}
    assert {m._qkv_same_embed_dim for m in modules if isinstance(m, nn.MultiheadAttention)} == {True, False}, "packed and separate"
    assert any(m.padding_idx is not None for m in modules if isinstance(m, nn.Embedding))
    names = {name.rpartition(".")[2] for case in LAYERS.values() for name, _ in case.make().named_parameters()}
    assert {"original", "original0", "weight_g", "weight_orig"} <= names, "spectral_norm and weight_norm, new and old"
    assert {"nf"} <= {name for m in modules for name in vars(m)}, "the Conv1D of transformers"
    assert any(not all(p.requires_grad for p in case.make().parameters()) for case in OTHERS), "an adapter on a frozen base"
