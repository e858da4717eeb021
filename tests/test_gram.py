"""Claims about `Gram`, `LowRank` and their common core:

- identity 19: the Gram matrix of a Linear layer is (A A^T) o (G G^T), its spectrum is the non-zero spectrum of the matrix, several layers
  add; each with a case in which it fails;
- the two ways for shared positions, by positions and by gradients, are equal, whatever is held at a time, and the cheaper one is taken;
- cost, counted as the largest tensor that any operation makes: n^2 or what is held already, never n p, where the Hadamard form serves and
  where it does not; a known Gram matrix is not computed again; U^T b is made once, as one vector;
- low-rank eigenpairs are those of the matrix, also with indefinite, dense and vanishing weights; Eckart and Young (identity 18).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from operator_specimens import draw, eye, outer_rows
from precond.inversion import inverse
from precond.operators import Gram, LowRank, gram_pieces
from precond.operators.gram_pieces import OneHotRows, OuterRows

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
size = st.integers(1, 4)


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that is made, and of all that are."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:  # a view makes nothing
                self.elements, self.total = max(self.elements, t.numel()), self.total + t.numel()
        return out


@settings(max_examples=40, deadline=None)
@given(K=st.integers(1, 3), N=size, R=size, wide=size, out=size, k=st.integers(1, 3), chunk=st.sampled_from([1, 7, 2**20]))
def test_every_way_to_the_gram_and_to_products_equals_the_rows_by_loops(
    K: int, N: int, R: int, wide: int, out: int, k: int, chunk: int
) -> None:
    a, g = draw(N, R, wide, seed=1), draw(K * N, R, out, seed=2)
    U, piece = outer_rows(a, g), OuterRows(a, g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_pieces, "CHUNK", chunk)
        for gram in (piece.gram(), piece._by_positions(), piece._by_gradients()):
            assert_close(gram, U @ U.T, **EXACT)
        assert_close(torch.cat(list(piece.rows()), -1), U, **EXACT)
        V, B = draw(out * wide, k, seed=3), draw(K * N, k, seed=4)
        assert_close(piece.left(V), U @ V, **EXACT)
        assert_close(piece.right(B), U.T @ B, **EXACT)
        assert_close(Gram([(a, g)]).left(V[:, 0]), U @ V[:, 0], **EXACT)
        assert_close(Gram([(a, g)]).right(B[:, 0]), U.T @ B[:, 0], **EXACT)


@pytest.mark.parametrize("shared", [True, False], ids=["shared_inputs", "own_inputs"])
def test_every_way_takes_stacks(shared: bool) -> None:
    a, g = draw(1 if shared else 3, 2, 3, 2), draw(3, 4, 3, 5, seed=1)
    U = torch.stack([outer_rows(a[0 if shared else i], g[i]) for i in range(3)])
    piece = OuterRows(a, g)
    for gram in (piece.gram(), piece._by_positions(), piece._by_gradients()):
        assert_close(gram, U @ U.mT, **EXACT)
    one = OuterRows(a[:, :, :1], g[:, :, :1])
    assert_close(one.gram(), one._by_gradients(), **EXACT)
    V, B = draw(3, 10, 2), draw(3, 4, 2)
    assert_close(piece.left(V), U @ V, **EXACT)
    assert_close(piece.right(B), U.mT @ B, **EXACT)


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_an_embedding_is_a_layer_on_one_hot_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_pieces, "CHUNK", chunk)
    index, g = torch.tensor([[0, 2, 2], [1, 2, 4]]), draw(4, 3, 2)
    hot, piece = torch.nn.functional.one_hot(index, 5).double(), OneHotRows(index, g, 5)
    U = torch.cat([outer_rows(g[i : i + 1], hot[i % 2][None]) for i in range(4)])  # (size, width): input first
    assert_close(piece.gram(), U @ U.T, **EXACT)
    assert_close(torch.cat(list(piece.rows()), 1), U, **EXACT)
    V, B = draw(10, 3), draw(4, 3)
    assert_close(piece.left(V), U @ V, **EXACT)
    assert_close(piece.right(B), U.T @ B, **EXACT)


def test_identity_19_hadamard_and_spectrum() -> None:
    a, g = draw(6, 1, 3), draw(6, 1, 4, seed=1)
    A, G = a[:, 0] @ a[:, 0].T, g[:, 0] @ g[:, 0].T
    C = Gram([(a, g)])
    assert_close(C.gram, A * G, **EXACT)
    assert_close(torch.linalg.eigvalsh(C.to_dense())[-6:], torch.linalg.eigvalsh(A * G), **EXACT)
    shared = Gram([(draw(6, 2, 3), draw(6, 2, 4, seed=1))])
    assert_close(torch.linalg.eigvalsh(shared.to_dense())[-6:], torch.linalg.eigvalsh(shared.gram), **EXACT)
    a, g = draw(6, 2, 3), draw(6, 2, 4, seed=1)
    with pytest.raises(AssertionError):  # negative: with shared positions it is no product of two sums
        assert_close(shared.gram, torch.einsum("nri,mri->nm", a, a) * torch.einsum("nri,mri->nm", g, g), **EXACT)


def test_layers_add() -> None:
    layers = [(draw(5, 1, 3, seed=s), draw(5, 1, 2, seed=s + 9)) for s in range(3)]
    whole = Gram([*layers, draw(5, 4)])
    assert_close(whole.gram, sum(Gram([p]).gram for p in (*layers, draw(5, 4))), **EXACT)
    with pytest.raises(AssertionError):  # negative: all of them count
        assert_close(whole.gram, Gram(layers).gram, **EXACT)


def test_columns_share_the_inputs_of_their_example() -> None:
    a, g = draw(3, 2, 4), draw(6, 2, 3, seed=1)
    assert_close(Gram([(a, g)]).to_dense(), Gram([(a.repeat(2, 1, 1), g)]).to_dense(), **EXACT)
    with pytest.raises(AssertionError):  # negative: columns are outermost
        assert_close(Gram([(a, g)]).to_dense(), Gram([(a.repeat_interleave(2, 0), g)]).to_dense(), **EXACT)


def test_a_large_layer_costs_no_more_than_what_is_held() -> None:
    n, wide = 32, 500  # n p is 8 million numbers
    a, g = torch.randn(n, 1, wide), torch.randn(n, 1, wide)
    C = Gram([(a, g)])
    with Largest() as seen:
        K = C.gram
        C.trace()
    assert seen.elements == n**2 and K.shape == (n, n)
    v = torch.randn(C.n)
    with Largest() as seen:
        C.right(C.left(v))
    assert seen.elements == C.n, "a vector, not n of them"
    P = inverse(C, solver="smw", damping=0.1)
    with Largest() as seen:
        P @ v
    assert seen.elements == C.n
    with Largest() as seen:  # negative: the counter counts
        outer_rows(a[:2], g[:2])
    assert seen.elements >= 2 * C.n


def test_a_vector_is_written_once_and_joined_by_no_copy() -> None:
    layers = [(torch.randn(4, 1, wide), torch.randn(4, 1, out)) for wide, out in ((70, 60), (60, 50))]
    C, b = Gram([*layers, torch.randn(4, 60)]), torch.randn(4)
    with Largest() as seen:
        made = C.right(b)
    assert C.n <= seen.total < 1.2 * C.n
    with Largest() as seen:  # negative: pieces that are joined are made twice
        joined = torch.cat([piece.right(b.unsqueeze(1)) for piece in C.pieces]).squeeze(1)
    assert seen.total > 1.9 * C.n
    assert_close(made, joined)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_products_can_be_differentiated(k: int) -> None:
    C = Gram([(draw(4, 2, 3), draw(8, 2, 5)), draw(8, 2)])
    v, w = (draw(C.n, k) if k else draw(C.n) for _ in range(2))
    v.requires_grad_()
    (found,) = torch.autograd.grad((C @ v * w).sum(), v)
    assert_close(found, C.to_dense() @ w, **EXACT)


@pytest.mark.parametrize(("R", "wide", "out"), [(3, 400, 300), (12, 60, 60)], ids=["positions", "gradients"])
def test_shared_positions_form_neither_all_gradients_nor_all_pairs(R: int, wide: int, out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 16
    a, g = torch.randn(n, R, wide), torch.randn(n, R, out)
    monkeypatch.setattr(gram_pieces, "CHUNK", 1)
    with Largest() as seen:
        Gram([(a, g)]).gram  # noqa: B018
    assert seen.elements <= max(n**2, a.numel(), g.numel()) < n * wide * out
    if R == 12:
        assert seen.elements < (n * R) ** 2


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("_by_positions", "_by_gradients", "_hadamard"):
        monkeypatch.setattr(OuterRows, name, lambda self, name=name: taken.append(name))
    for R, wide, out in ((1, 3, 3), (2, 50, 50), (60, 3, 3)):
        OuterRows(draw(4, R, wide), draw(4, R, out)).gram()
    assert taken == ["_hadamard", "_by_positions", "_by_gradients"]


def test_a_known_gram_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    U = draw(3, 5)
    monkeypatch.setattr(LowRank, "_compute_gram", lambda self: pytest.fail("computed"))
    known = LowRank(U, gram=U @ U.T)
    assert_close(known.spectral().to_dense(), U.T @ U, **EXACT)
    assert_close(known.trace(), U.square().sum(), **EXACT)


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 5), p=st.integers(1, 6), kind=st.sampled_from(["none", "positive", "indefinite", "dense", "centred"]))
def test_eigenpairs_are_those_of_the_matrix(r: int, p: int, kind: str) -> None:
    U = draw(r, p, seed=r + 7 * p)
    S = draw(r, r, seed=3)
    W = {
        "none": eye(r), "positive": torch.diag(draw(r).abs() + 0.1), "indefinite": torch.diag(draw(r).sign() * (draw(r).abs() + 0.1)),
        "dense": S + S.T, "centred": eye(r) - 1 / r,
    }[kind]  # fmt: skip
    weights = None if kind == "none" else W if kind in ("dense", "centred") else W.diagonal()
    C, M = LowRank(U, weights), U.T @ W @ U
    eigen = C.spectral()
    assert_close(eigen.to_dense(), M, rtol=1e-8, atol=1e-9)  # Gram-side vectors lose the condition number of U U^T
    B = eigen.map(lambda s: s / (s + 20)).to_dense()  # negative eigenvalues as well
    assert_close(B, M @ torch.linalg.inv(M + 20 * eye(p)), rtol=1e-8, atol=1e-9)


def test_the_rank_of_the_rows_bounds_what_is_kept_and_noise_is_dropped() -> None:
    U = draw(2, 6)
    doubled = LowRank(torch.cat([U, U, U.sum(0, keepdim=True)]))  # five rows of rank two
    values = doubled.spectral().values
    assert int((values != 0).sum()) == 2
    assert_close(values.sum(), doubled.trace(), **EXACT)
    assert (doubled.spectral().vectors[:, values == 0] == 0).all()


def test_identity_18_eckart_young() -> None:
    M = draw(5, 5) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64))
    d, V = torch.linalg.eigh(M.T @ M)
    exact, truncated = LowRank(V.T, d), LowRank(V.T[2:], d[2:])
    assert_close(exact.to_dense(), M.T @ M, **EXACT)
    error = torch.linalg.matrix_norm(M.T @ M - truncated.to_dense())
    assert_close(error, math.sqrt(float(d[0] ** 2 + d[1] ** 2)) * torch.ones_like(error), **EXACT)
