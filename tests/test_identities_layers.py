"""Identities 20 and 21: the same computation in another layer has the same curvature (float64, 1e-10), and what must differ does.

- 20: `kron_dim` of one Linear is L = G G^T and R = G^T G; a rank-one gradient is held exactly, two are not; a vector has the full matrix
  of AdaGrad; a tensor of k dimensions has k factors.
- 21: a grouped convolution is one convolution a group; a 1x1 convolution is a Linear on the pixels; an Embedding is a Linear on one-hot
  rows; the rows of a padding index are zero. Each for every matrix that has columns and every representation that has a meaning.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from nets import CASES, labels, normal, seeded
from pairs import PAIRS, SAMPLED
from precond.matrices import FisherMC
from precond.representations import KronDim, KronIO

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE = nn.CrossEntropyLoss()


def curve(model: nn.Module, x: Tensor, y: Tensor, matrix: Any, repr: Any, criterion: nn.Module = CE) -> Any:
    return precond.curvature(model, criterion, x, y, matrix=matrix, repr=repr, seed=3)


def apart(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * b.norm())


# -- 20 ----------------------------------------------------------------------------------------------------------------


def test_20_factors_of_a_matrix_are_products_of_the_gradient_with_itself() -> None:
    model, x, y = seeded(lambda: nn.Linear(4, 3)), normal(6, 4), labels(3, 6)
    C = curve(model, x, y, "batched_empirical_fisher", "kron_dim")
    CE(model(x), y).backward()
    G, g = model.weight.grad, model.bias.grad
    L, R = C.blocks["weight"].factors
    close(L.to_dense(), G @ G.T)
    close(R.to_dense(), G.T @ G)
    close(C.blocks["bias"].to_dense(), torch.outer(g, g))


@pytest.mark.parametrize("normalisation", ["geometric", "trace"])
def test_20_one_rank_one_gradient_is_held_exactly_and_two_are_not(normalisation: Any) -> None:
    """Squares are compared for the geometric form: the root of a zero eigenvalue that rounding made 1e-17 is 3e-9."""
    model, x, y = seeded(lambda: nn.Linear(4, 3, bias=False)), normal(2, 4), labels(3, 2)
    repr = KronDim(normalisation=normalisation)
    for matrix in ("batched_empirical_fisher", "empirical_fisher", "fisher_mc"):
        K, M = (curve(model, x[:1], y[:1], matrix, r).to_dense() for r in (repr, "layer"))
        close(K @ K, M @ M)
        K, M = (curve(model, x, y, matrix, r).to_dense() for r in (repr, "layer"))
        assert apart(K @ K, M @ M)


def test_20_a_tensor_of_k_dimensions_has_k_factors() -> None:
    case = CASES["conv"]
    blocks = curve(case.make(), case.inputs, case.targets, "batched_empirical_fisher", "kron_dim").blocks
    for name, parameter in case.make().named_parameters():
        assert blocks[name].sizes == tuple(parameter.shape)
        assert blocks[name].exponent == 1 / parameter.dim()


# -- 21 ----------------------------------------------------------------------------------------------------------------


class Groups(nn.Module):
    """A convolution a group, side by side."""

    def __init__(self, grouped: nn.Conv2d) -> None:
        super().__init__()
        n, split = grouped.groups, lambda p: p.detach().chunk(grouped.groups)
        options = {"stride": grouped.stride, "padding": grouped.padding, "dilation": grouped.dilation}
        sizes = (grouped.in_channels // n, grouped.out_channels // n, grouped.kernel_size)
        self.each = nn.ModuleList(nn.Conv2d(*sizes, **options) for _ in range(n)).double()
        with torch.no_grad():
            for conv, weight, bias in zip(self.each, split(grouped.weight), split(grouped.bias), strict=True):
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(part) for conv, part in zip(self.each, x.chunk(len(self.each), 1), strict=True)], 1)


class Pixels(nn.Module):
    """A Linear on every pixel, its channels where a convolution has them."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.linear = nn.Linear(conv.in_channels, conv.out_channels).double()
        with torch.no_grad():
            self.linear.weight.copy_(conv.weight.flatten(1))
            self.linear.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class OneHot(nn.Module):
    """A Linear on one-hot rows."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding.num_embeddings, embedding.embedding_dim, bias=False).double()
        with torch.no_grad():
            self.linear.weight.copy_(embedding.weight.T)

    def forward(self, index: Tensor) -> Tensor:
        return self.linear(nn.functional.one_hot(index, self.linear.in_features).double())


# not kron_dim, whose factors are those of the tensor's shape, nor products of |H|, of which a dense matrix takes too many;
# nor the recursion, which refuses the modules made here
CELLS = [c for c in PAIRS if c[1] != "kron_dim" and c != ("abs_hessian", "matrix_free") and c[0] != "ggn_recursive"]
CELLS += [(m, KronIO(sharing="reduce")) for m, r in CELLS if r == "kron_io"]
FOLDED = ("input_second_moment", KronIO(sharing="reduce"))  # leaves an Embedding as it is
each_cell = pytest.mark.parametrize(("matrix", "repr"), CELLS, ids=str)


def after(front: nn.Module, size: int) -> nn.Module:
    """The layer in a network that mixes positions and classes."""
    head = seeded(lambda: nn.Linear(size, 3), 9)
    return nn.Sequential(front, nn.Tanh(), nn.Flatten(), head)


@each_cell
def test_21_a_grouped_convolution_is_one_convolution_a_group(matrix: Any, repr: Any) -> None:
    grouped = seeded(lambda: nn.Conv2d(4, 6, 2, stride=2, padding=1, groups=2))
    x, y = normal(5, 4, 3, 4), labels(3, 5)
    one, many = after(grouped, 36), after(Groups(grouped), 36)
    close(one(x), many(x))
    places = dense.positions(many)
    weights = [torch.arange(places[f"0.each.{i}.weight"].start, places[f"0.each.{i}.weight"].stop) for i in range(2)]
    biases = [torch.arange(places[f"0.each.{i}.bias"].start, places[f"0.each.{i}.bias"].stop) for i in range(2)]
    head = torch.arange(places["3.weight"].start, places["3.bias"].stop)
    order = torch.cat([*weights, *biases, head])
    got, want = curve(one, x, y, matrix, repr).to_dense(), curve(many, x, y, matrix, repr).to_dense()[order][:, order]
    # the one layer has a block across its groups, which the two have not
    if repr in ("layer", "layer_low_rank", "layer_gram") and matrix != "input_second_moment":
        assert apart(got, want)
        if matrix == "abs_hessian":  # whose blocks are not those of the whole
            return
        got = got * _same_group(weights, biases, head)
    close(got, want)


def _same_group(weights: list[Tensor], biases: list[Tensor], head: Tensor) -> Tensor:
    group = torch.cat(
        [torch.full((len(part),), i) for i, part in ((0, weights[0]), (1, weights[1]), (0, biases[0]), (1, biases[1]), (2, head))]
    )
    return (group.unsqueeze(0) == group.unsqueeze(1)).double()


@each_cell
def test_21_a_1x1_convolution_is_a_linear_on_the_pixels(matrix: Any, repr: Any) -> None:
    conv = seeded(lambda: nn.Conv2d(3, 2, 1))
    x, y = normal(5, 3, 2, 3), labels(3, 5)
    one, other = after(conv, 12), after(Pixels(conv), 12)
    close(one(x), other(x))
    close(curve(one, x, y, matrix, repr).to_dense(), curve(other, x, y, matrix, repr).to_dense())
    if matrix != "batched_empirical_fisher" and repr in ("layer", "unit", "diagonal"):
        assert apart(curve(one, x, y, matrix, repr).to_dense(), curve(one, x.flip(3), y, matrix, repr).to_dense())


@pytest.mark.parametrize(("matrix", "repr"), [c for c in CELLS if not str(c[1]).startswith("unit") and not isinstance(c[1], KronIO)], ids=str)
def test_21_an_embedding_is_a_linear_on_one_hot_rows(matrix: Any, repr: Any) -> None:
    """Units differ on purpose: those of an Embedding are its rows. By reduction an Embedding has no factors."""
    embedding = seeded(lambda: nn.Embedding(5, 2))
    index, y = labels(5, 4, 3, seed=6), labels(3, 4)
    one, other = after(embedding, 6), after(OneHot(embedding), 6)
    close(one(index), other(index))
    order = torch.cat([torch.arange(10).reshape(2, 5).T.flatten(), torch.arange(10, 10 + 21)])
    want = curve(other, index, y, matrix, repr).to_dense()
    close(curve(one, index, y, matrix, repr).to_dense(), want[order][:, order])
    if repr == "kron_io":
        assert type(curve(one, index, y, matrix, repr).blocks["0"].factors[0]) is precond.operators.Diagonal
        assert apart(curve(one, index, y, matrix, repr).to_dense(), want)


@pytest.mark.parametrize(("matrix", "repr"), [c for c in CELLS if c[0] not in SAMPLED and c != FOLDED] + [("ggn", "kron_dim")], ids=str)
def test_21_rows_of_the_padding_index_are_zero(matrix: Any, repr: Any) -> None:
    index, y = labels(5, 4, 3, seed=6), labels(3, 4)
    pad = int(index[0, 0])

    def rows(padding: int | None) -> Tensor:
        model = after(seeded(lambda: nn.Embedding(5, 2, padding_idx=padding)), 6)
        M = curve(model, index, y, matrix, repr).to_dense()
        where = torch.tensor([2 * pad, 2 * pad + 1])
        return torch.cat([M[where].flatten(), M[:, where].flatten()])

    assert rows(pad).abs().max() < (1e-7 if repr == "kron_dim" else 1e-300), "a root of rounding, for kron_dim"
    assert rows(None).abs().max() > 1e-6


def test_labels_are_the_same_in_both_of_a_pair() -> None:
    """The control of the sampled cells above: another seed is another matrix."""
    conv, x, y = seeded(lambda: nn.Conv2d(3, 2, 1)), normal(5, 3, 2, 3), labels(3, 5)
    first, second = (precond.curvature(after(conv, 12), CE, x, y, matrix=FisherMC(), repr="layer", seed=s).to_dense() for s in (3, 4))
    assert apart(first, second)
