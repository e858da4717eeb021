"""The grid layer x representation x matrix: each is the projection of the dense oracle's matrix, float64 at 1e-10.

- Every layer of `layer_cases.py`, every representation, every matrix that a batch determines and that the representation can be built
  from; drawn labels are those that were drawn. Every day each layer is held by half of the representations, the next by the other half, another
  matrix on each, beside those of `test_layers_cases.py`; the rest is slow.
- Where a representation has no meaning for a layer the oracle knows the fallback. With a sketch or few positions only the estimate of the
  Gram matrix differs.
- Negative control: the matrices of a layer are not one and the same, and what is projected away is there.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import dense_derived
import precond
from layer_cases import CONVOLUTIONS, LAYERS
from nets import normal
from pairs import LEFT, PAIRS, SAMPLED, exactly
from precond import representations
from precond.matrices import BatchedFisherMC, FisherMC
from precond.representations import LayerGram

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
WITH_INPUTS = [case.name for case in CONVOLUTIONS] + ["hf", "lora"]
"""The layers of which inputs alone make a matrix."""
SLOW = ("lstm", "gru", "rnn")
PLAIN = ("full", "unit", "diagonal", "kron_io")
"""Walked every day with two matrices each by `test_layers_cases.py`."""


def hosted(layer: str, repr: str) -> list[str]:
    """The matrices that the representation can hold of a layer; the recursion is for chains of linear layers."""
    return [m for m, r in PAIRS if r == repr and m != "ggn_recursive" and (m != "input_second_moment" or layer in WITH_INPUTS)]


def everyday(layer: str, repr: str) -> str:
    """The matrix of the day: another one on the next layer; of recurrent modules, whose products are slow, one made of columns."""
    matrices = hosted(layer, repr)
    if layer in SLOW and repr != "matrix_free":
        matrices = [m for m in matrices if m in ("ggn", "fisher", "empirical_fisher", "gradient_covariance")]
    at = list(LAYERS).index(layer) + representations.names().index(repr)
    return "ggn" if layer in SLOW and repr == "matrix_free" else matrices[at % len(matrices)]


CELLS = [(layer, repr) for layer in LAYERS for repr in representations.names()]
TODAY = [(layer, repr) for at, (layer, repr) in enumerate(CELLS) if at % 2 == 0 and repr not in PLAIN]
"""Every layer in every second representation; the number of representations is odd, so that the next layer is in the others."""


@functools.cache
def _fixed(layer: str, matrix: str) -> Tensor:
    """In the place of that of `dense_cells`, whose cases have other names."""
    case = LAYERS[layer]
    return dense_cells.MATRICES[matrix](case.make(), case.criterion, case.inputs, case.targets)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the matrices of drawn labels sent back."""
    sent: list[Tensor] = []
    for kind in (FisherMC, BatchedFisherMC):
        original = kind.cotangents

        def cotangents(matrix: Any, context: Any, original: Any = original) -> Tensor:
            sent.append(original(matrix, context))
            return sent[-1]

        monkeypatch.setattr(kind, "cotangents", cotangents)
    monkeypatch.setattr(dense_cells, "_fixed", _fixed)
    return sent


def curve(layer: str, matrix: Any, repr: Any) -> Any:
    case = LAYERS[layer]
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=11)


def check(layer: str, repr: str, matrix: str, drawn: list[Tensor]) -> None:
    case = LAYERS[layer]
    drawn.clear()
    got = curve(layer, exactly(matrix, repr, case.make()), repr)
    sampled = drawn[0] if matrix in SAMPLED else None
    assert len(drawn) == (matrix in SAMPLED)
    if repr == "kron_dim":
        for name, factors in dense_cells.kron_dim_factors(case, matrix, sampled).items():
            if not factors:  # of a number
                rows, scale = dense_cells.columns(case, matrix, sampled)
                factors = [scale * dense.split(rows, case.make())[name].square().sum().view(1, 1)]
            for factor, want in zip(got.blocks[name].factors, factors, strict=True):
                close(factor.to_dense(), want)
        return
    want = dense_cells.REPRESENTATIONS[repr](case, matrix, sampled)
    if (matrix, repr) == ("abs_hessian", "matrix_free"):  # a Lanczos process each
        v = normal(got.shape[0])
        close(got @ v, want @ v)
    else:
        close(got.to_dense(), want)


@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize(("layer", "repr"), TODAY)
def test_a_layer_in_a_representation_is_the_projection_of_the_oracles_matrix(layer: str, repr: str, drawn: list[Tensor]) -> None:
    check(layer, repr, everyday(layer, repr), drawn)


@pytest.mark.slow
@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize(("layer", "repr"), CELLS)
def test_every_matrix_of_a_layer_in_a_representation_is_its_projection(layer: str, repr: str, drawn: list[Tensor]) -> None:
    for matrix in hosted(layer, repr):
        check(layer, repr, matrix, drawn)


@pytest.mark.parametrize("layer", ["weight-norm", "weight-norm-conv", "bag-mean", "bag-offsets-max", "bag-last"])
def test_the_oracles_hessian_is_that_of_finite_differences(layer: str) -> None:
    case = LAYERS[layer]
    model, H, step = case.make(), _fixed(layer, "hessian"), 1e-5
    close(H, H.T)
    parameters = list(model.parameters())
    point = nn.utils.parameters_to_vector(parameters).detach()

    def slope(theta: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(theta, parameters)
        return dense.gradient(model, case.criterion, case.inputs, case.targets)

    for i in range(0, len(point), 3):
        e = torch.zeros_like(point)
        e[i] = step
        torch.testing.assert_close((slope(point + e) - slope(point - e)) / (2 * step), H[i], rtol=1e-7, atol=1e-7)  # of order step^2
    assert H.abs().max() > 0.1


@pytest.mark.parametrize("layer", ["spectral-norm", "spectral-norm-hook", "batchnorm1d"])
def test_products_are_those_at_the_buffers_that_the_pass_began_with(layer: str) -> None:
    """A training step that moves what the forward pass reads; the buffers end as without us."""
    case = LAYERS[layer]
    plain, model = case.make(), case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    made = precond.Preconditioner(matrix="ggn", repr="full", solver="eigen", damping=0.1)
    products = precond.Preconditioner(matrix="hessian", repr="layer", solver="eigen", damping=5.0)
    made.attach(model, case.criterion, optimizer)
    products.attach(model, case.criterion, optimizer)
    for _ in range(2):
        H = dense.hessian(plain, case.criterion, case.inputs, case.targets)
        plain(case.inputs)
        case.criterion(model(case.inputs), case.targets).backward()
        optimizer.step()
        close(products.operators["0"].to_dense(), H[: products.operators["0"].n, : products.operators["0"].n])
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("layer", ["conv1d", "embedding", "groupnorm", "self", "bare", "transposed2d", "hf"])
def test_a_sketch_of_a_layer_leaves_its_matrix_as_it_is(layer: str) -> None:
    C, exact = curve(layer, "ggn", LayerGram(sketch=1)), curve(layer, "ggn", "layer_gram")
    v = normal(C.shape[0])
    close(C @ v, exact @ v)
    estimates = [(C.blocks[name].gram - block.gram).abs().max() for name, block in exact.blocks.items()]
    assert max(estimates) > 1e-6 and all(bool(C.blocks[name].gram.isfinite().all()) for name in C.blocks)


def test_every_representation_and_every_matrix_has_its_day() -> None:
    assert {repr for _, repr in TODAY} == set(representations.names()) - set(PLAIN)
    assert {layer for layer, _ in TODAY} == set(LAYERS)
    assert {everyday(*cell) for cell in TODAY} == {m for m, _ in PAIRS} - {"ggn_recursive", "input_second_moment"}


def test_the_matrices_and_projections_of_a_layer_differ() -> None:
    names = ("hessian", "ggn", "empirical_fisher", "gradient_covariance", "batched_empirical_fisher")
    found = [_fixed("conv1d", m) for m in names]
    model = LAYERS["conv1d"].make()
    found += [dense.project_layer(found[1], model), dense.project_unit(found[1], model), dense.project_diagonal(found[1])]
    found += [dense_derived.absolute(found[0])]
    for i, M in enumerate(found):
        assert all((M - other).norm() > 1e-4 * M.norm() for other in found[:i])
