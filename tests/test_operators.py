"""Claims about operators, each for every structure; `operator_specimens.py` has the specimens, and a class without one fails:

- `to_dense` is the matrix written down by hand, `@`, `diagonal`, `trace`, `quadratic_form` and `logdet` are those of that matrix, in the
  operator's dtype;
- a sample is R z with R R^T the matrix, so its covariance is right by construction, with no Monte-Carlo tolerance;
- `spectral`, where there is one, is the same matrix, and a function of it is that function of the matrix;
- `pack` is read by `torch.load(weights_only=True)` and `unpack` gives the same operator; `to` casts it;
- a vector of a wrong shape or dtype is refused with a sentence; so are `logdet`, `sample`, `pack` and `to` where they do not exist.

And for single ones: row-major vec, the order of Kronecker factors, exponents, coordinates of blocks, live operators, patterns.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from operator_specimens import (
    INDEFINITE,
    NO_EIGENDECOMPOSITION,
    NO_ROOT,
    SPECIMENS,
    Maker,
    blocks,
    definite,
    diagonal,
    draw,
    eye,
    function,
    inverse_sparse_precision,
    kronecker_power,
    live_shifted,
    matrix_free,
    positive,
    root,
    sparse_precision,
)
from precond import operators
from precond.errors import InvalidCombination, UsageError
from precond.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Gram,
    Inverse,
    InverseBlockDiagonal,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    LowRank,
    LowRankEigen,
    MatrixFree,
    Operator,
    RootShifted,
    Sparse,
    SparsePrecision,
    pack,
    unpack,
)

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
CASES = [pytest.param(make, seed, id=f"{make.__name__}-{seed}") for makers in SPECIMENS.values() for make in makers for seed in range(2)]
every = pytest.mark.parametrize(("make", "seed"), CASES)


def test_every_class_has_a_specimen_of_its_own() -> None:
    public = [getattr(operators, name) for name in operators.__all__]
    classes = {x for x in public if isinstance(x, type) and issubclass(x, Operator) and not inspect.isabstract(x)}
    written = set()
    for found in pkgutil.iter_modules(operators.__path__):
        module = importlib.import_module(f"precond.operators.{found.name}")
        own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
        written |= {x for x in own if issubclass(x, Operator) and not inspect.isabstract(x)}
    assert written == classes, "each is public"
    assert classes - {operators.Pairs} == set(SPECIMENS)  # a constraint is no matrix: `test_pairs.py`
    for kind, makers in SPECIMENS.items():
        assert makers and all(type(make(0)[0]) is kind for make in makers)


@every
def test_is_the_matrix_written_by_hand(make: Maker, seed: int) -> None:
    C, M = make(seed)
    assert C.shape == M.shape and C.n == len(M) and C.dtype == torch.float64 and C.device.type == "cpu"
    assert_close(C.to_dense(), M, **EXACT)
    assert_close(C.to_dense(), C.to_dense().T, **EXACT)
    assert_close(C.diagonal(), M.diagonal(), **EXACT)
    assert_close(C.trace(), M.trace(), **EXACT)


@every
def test_products_with_a_vector_with_columns_and_with_none(make: Maker, seed: int) -> None:
    C, M = make(seed)
    V = draw(len(M), 3, seed=7)
    assert_close(C @ V, M @ V, **EXACT)
    assert_close(C @ V[:, 0], M @ V[:, 0], **EXACT)
    assert_close(C @ V.T.contiguous().T, M @ V, **EXACT)  # strides do not matter
    assert (C @ V[:, :0]).shape == (len(M), 0) if not C.live else True
    assert_close(C.quadratic_form(V[:, 0]), V[:, 0] @ M @ V[:, 0], **EXACT)
    assert_close(C.quadratic_form(V), torch.stack([v @ M @ v for v in V.T]), **EXACT)


@every
def test_wrong_vectors_are_refused_with_a_sentence(make: Maker, seed: int) -> None:
    C, M = make(seed)
    n = len(M)
    for v in (draw(n + 1), draw(1, n + 1), draw(n, 1, 1), torch.tensor(1.0, dtype=torch.float64)):
        with pytest.raises(ValueError, match="multiplies a vector"):
            C @ v
    with pytest.raises(TypeError, match=r"cast one with \.to"):
        C @ draw(n).float()


@every
def test_logdet(make: Maker, seed: int) -> None:
    C, M = make(seed)
    if make in NO_EIGENDECOMPOSITION:
        with pytest.raises(InvalidCombination, match="no eigendecomposition"):
            C.logdet()
    elif torch.linalg.matrix_rank(M, hermitian=True) < len(M):
        assert C.logdet() == -torch.inf or (make in INDEFINITE and C.logdet().isnan())
    else:
        assert_close(C.logdet(), torch.linalg.slogdet(M).logabsdet, **EXACT)


@every
def test_covariance_of_samples_is_the_matrix_by_construction(make: Maker, seed: int) -> None:
    C, M = make(seed)
    if make in NO_ROOT:
        with pytest.raises((NotImplementedError, InvalidCombination), match=r"Dense\(operator.to_dense\(\)\)"):
            C.sample()
        return
    if make in INDEFINITE:
        return  # there is no such distribution
    R = C._colour(eye(C.noise))
    assert_close(R @ R.T, M, **EXACT)
    z = torch.randn(C.noise, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(C.sample(torch.Generator().manual_seed(3)), (R @ z)[:, 0], **EXACT)


@every
def test_functions_of_the_spectrum_are_functions_of_the_matrix(make: Maker, seed: int) -> None:
    C, M = make(seed)
    try:
        eigen = C.spectral()
    except InvalidCombination:
        assert make in (*NO_EIGENDECOMPOSITION, inverse_sparse_precision) or C.kind in (
            "BlockDiagonal",
            "InverseBlockDiagonal",
            "SparsePrecision",
            "MadePrecision",
            "Repeated",
        )
        return
    assert make not in NO_EIGENDECOMPOSITION
    assert_close(eigen.to_dense(), M, **EXACT)
    assert_close(eigen.map(lambda s: s.square() + 0.5).to_dense(), M @ M + 0.5 * eye(C.n), **EXACT)


@every
def test_packs_to_what_torch_loads_with_weights_only(make: Maker, seed: int) -> None:
    C, M = make(seed)
    if isinstance(C, (Inverse, InverseBlockDiagonal)):
        with pytest.raises(UsageError, match="pack or cast the operator it was made from"):
            pack(C)
        return
    file = io.BytesIO()
    torch.save(pack(C), file)
    file.seek(0)
    packed = torch.load(file, weights_only=True)
    if C.live:
        with pytest.raises(UsageError, match="hand the live operator"):
            unpack(packed)
    again = unpack(packed, live=C if C.live else None)
    assert type(again) is type(C)
    assert_close(again.to_dense(), C.to_dense(), rtol=0, atol=0)
    assert_close(again.to_dense(), M, **EXACT)


@every
def test_casts_all_or_refuses(make: Maker, seed: int) -> None:
    C, M = make(seed)
    if C.live or isinstance(C, (Inverse, InverseBlockDiagonal)):
        with pytest.raises(UsageError, match=r"cannot be cast|pack or cast the operator it was made from"):
            C.to(dtype=torch.float32)
        return
    single = C.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert {t.dtype for t in single.tensors() if t.is_floating_point()} == {torch.float32}
    assert_close(single.to_dense(), M.float(), rtol=1e-3, atol=1e-4)  # fourth powers through a float32 eigendecomposition
    v = torch.ones(C.n)
    results = [single @ v, single.diagonal(), single.trace(), single.quadratic_form(v)]
    results += [single.logdet()] if make not in NO_EIGENDECOMPOSITION else []
    results += [single.sample()] if make not in NO_ROOT + INDEFINITE else []
    assert {x.dtype for x in results} == {torch.float32}


def test_kronecker_is_row_major_and_its_order_matters() -> None:
    B, A, W = definite(2, seed=1), definite(3, seed=2), draw(2, 3)
    assert_close(Kronecker(B, A) @ W.flatten(), (B @ W @ A.T).flatten(), **EXACT)
    same = definite(2, seed=3)
    with pytest.raises(AssertionError):  # negative: column-major papers write the factors the other way round
        assert_close(Kronecker(B, same).to_dense(), Kronecker(same, B).to_dense(), **EXACT)


def test_strides_of_factors_do_not_matter() -> None:
    A, B = definite(2, seed=1), definite(3, seed=2)
    Q = torch.linalg.qr(B)[0]
    assert not Q.is_contiguous()
    assert_close(Kronecker(A.T.contiguous().T, Q).to_dense(), torch.kron(A, Q.contiguous()), **EXACT)


def test_materialise_raises_the_factors_and_keeps_the_scale() -> None:
    C, M = kronecker_power(0)
    assert isinstance(C, Kronecker)
    assert C.materialise().exponent == 1 and C.materialise().scale == 2
    assert C.materialise() is C.materialise(), "an eigendecomposition is made once"
    assert_close(C.materialise().to_dense(), M, **EXACT)


def test_a_fractional_power_takes_round_off_as_zero() -> None:
    u = draw(4, 1)
    C = Kronecker(u @ u.T, exponent=0.25)  # rank one: 1e-17 to the power 1/4 would be 6e-5
    assert_close(C.to_dense(), u @ u.T / u.norm() ** 1.5, **EXACT)


def test_a_kronecker_product_is_never_formed() -> None:
    n = 300  # formed, it would hold 65 GB
    C = Kronecker(torch.eye(n), torch.ones(n), scale=2.0)
    assert_close(C @ torch.ones(n * n), torch.full((n * n,), 2.0))
    assert_close(C.trace(), torch.tensor(2.0 * n * n))


def test_root_shifted_has_the_damping_outside_the_power() -> None:
    C, _ = diagonal(0)
    d = C.diagonal()
    assert_close(RootShifted(C, 0.3, 0.5).diagonal(), (d.sqrt() + 0.3) ** 2, **EXACT)
    with pytest.raises(AssertionError):  # negative: not the same as inside
        assert_close(RootShifted(C, 0.3, 0.5).diagonal(), d + 0.3, **EXACT)


def test_blocks_keep_their_names_and_refuse_what_does_not_fit() -> None:
    C, _ = blocks(0)
    assert isinstance(C, BlockDiagonal) and list(C.blocks) == ["a", "kind"]
    with pytest.raises(ValueError, match="positions of shape"):
        BlockDiagonal({"a": Diagonal(draw(2))}, {"a": torch.tensor([1])}, n=3)
    with pytest.raises(ValueError, match="more than n"):
        BlockDiagonal({"a": Diagonal(draw(2))}, n=1)
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonal({})


def test_live_blocks_are_filled_by_name() -> None:
    (C, M), (D, N) = matrix_free(0), live_shifted(0)
    whole = BlockDiagonal({"x": C, "y": D, "z": Diagonal(torch.ones(1, dtype=torch.float64))})
    assert whole.live
    assert_close(unpack(pack(whole), live=whole).to_dense(), torch.block_diag(M, N, eye(1)), **EXACT)
    wrong = MatrixFree(lambda v: v, C.n + 1, torch.float64, "cpu")
    with pytest.raises(UsageError, match=f"{C.n + 1} coordinates"):
        unpack(pack(C), live=wrong)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dense(draw(2, 3)), "square matrix"),
        (lambda: Diagonal(torch.tensor(1.0)), "vector"),
        (lambda: Kronecker(), "at least one factor"),
        (lambda: Kronecker(definite(2, 3), definite(3)), "common leading dimension"),
        (lambda: KroneckerEigen((None,), draw(2, 3, 4)), "as many dimensions"),
        (lambda: KroneckerEigen((eye(2),), draw(3)), "does not fit"),
        (lambda: RootShifted(Diagonal(draw(2)), 0.1, 0), "power 0"),
        (lambda: LowRank(draw(3)), r"rows \(r, p\)"),
        (lambda: LowRank(draw(3, 2), draw(2)), r"weights of 3 rows have shape \(3,\) or \(3, 3\)"),
        (lambda: LowRank(draw(3, 2), gram=draw(3)), "gram of 3 rows"),
        (lambda: LowRankEigen(LowRank(draw(3, 2)), draw(2, 2), draw(2), draw(1)[0]), "3 rows take vectors"),
        (lambda: Gram([]), "at least one piece"),
        (lambda: Gram([draw(3)]), r"rows of a Gram are \(n, p\)"),
        (lambda: Gram([(draw(3, 1, 2), draw(4, 1, 2))]), "a layer of a Gram"),
        (lambda: Gram([(draw(2, 3, 1, 2), draw(4, 3, 1, 2))]), "a layer of a Gram"),
        (lambda: Gram([(torch.zeros(3, dtype=torch.long), draw(3, 1, 2), 4)]), "an embedding of a Gram"),
        (lambda: Gram([draw(3, 2), draw(4, 2)]), "one number of rows"),
        (lambda: KroneckerSum(), "at least one"),
        (lambda: KroneckerSum(eye(2), Kronecker(eye(2), eye(2))), "of one kind"),
        (lambda: KroneckerSum(Kronecker(eye(2), eye(3)), Kronecker(eye(3), eye(2))), "one set of sizes"),
        (lambda: KroneckerSum(Kronecker(eye(2), eye(3)), exponent=0.5), "none with products"),
        (lambda: Sparse(torch.zeros(2, 3, dtype=torch.long), draw(2), 4), "indices"),
        (lambda: SparsePrecision(draw(2, 2, 2), torch.zeros(2, 2, dtype=torch.long)), "parents"),
        (lambda: SparsePrecision(definite(2, 2), torch.tensor([[1], [0]])).to_dense(), "cycle"),
    ],
)
def test_shapes_that_are_no_operator_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_kronecker_sum_is_neither_a_product_nor_without_its_identities() -> None:
    A, B, X = definite(2, seed=1), definite(3, seed=2), draw(2, 3)
    assert_close(KroneckerSum(A, B) @ X.flatten(), (A @ X + X @ B).flatten(), **EXACT)
    with pytest.raises(AssertionError):  # negative
        assert_close(KroneckerSum(A, B).to_dense(), Kronecker(A, B).to_dense(), **EXACT)


def test_caspr_is_a_power_mean_over_axes() -> None:
    L, R, G = definite(2, seed=1), definite(3, seed=2), draw(2, 3)
    C = KroneckerSum(L, R, exponent=-0.25, scale=2.0**4)
    direction = C.spectral().map(lambda s: s**-0.5) @ G.flatten()
    expected = (root(L, -0.5) @ G + 2 * root(L, -0.25) @ G @ root(R, -0.25) + G @ root(R, -0.5)) / 4
    assert_close(direction, expected.flatten(), **EXACT)


def test_materialise_of_a_sum_leaves_no_exponent() -> None:
    terms = KroneckerSum(Kronecker(definite(2), definite(3), exponent=0.5), scale=3.0)
    flat = terms.materialise()
    assert isinstance(flat, KroneckerSum) and flat.terms[0].exponent == 1
    mean = KroneckerSum(definite(2), definite(3), exponent=0.5)
    for C in (terms, mean):
        assert_close(C.materialise().to_dense(), C.to_dense(), **EXACT)
    assert isinstance(mean.materialise(), KroneckerEigen)


def test_entries_given_twice_add_and_the_diagonal_is_there_once() -> None:
    C = Sparse(torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]), torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    assert_close(C.to_dense(), torch.tensor([[1.0, 5.0], [5.0, 4.0]]))
    assert_close(C @ torch.ones(2), torch.tensor([6.0, 9.0]))


def network(F: torch.Tensor, parents: list[list[int]]) -> SparsePrecision:
    k = max(len(pa) for pa in parents)
    table = torch.tensor([pa + [-1] * (k - len(pa)) for pa in parents])
    own = torch.cat([torch.arange(len(F)).unsqueeze(1), table.clamp(min=0)], 1)
    return SparsePrecision(F[own.unsqueeze(2), own.unsqueeze(1)], table)


def test_a_sparse_precision_is_exact_with_all_parents_and_diagonal_with_none() -> None:
    F, lam = definite(5), 0.3
    full, none = network(F, [list(range(i)) for i in range(5)]), network(F, [[-1]] * 5)
    assert_close(full.plus(lam).inverse_matmul(eye(5)), torch.linalg.inv(F + lam * eye(5)), **EXACT)
    assert_close(full.plus(lam).to_dense(), F + lam * eye(5), **EXACT)
    assert_close(none.plus(lam).to_dense(), torch.diag(F.diagonal() + lam), **EXACT)
    chain = network(F, [[-1], [0], [1], [2], [3]])
    with pytest.raises(AssertionError):  # negative: a chain of one parent each is not enough
        assert_close(chain.to_dense(), F, **EXACT)


def test_a_sparse_precision_is_exact_where_the_precision_has_the_graph() -> None:
    L = eye(5)
    L[1, 0], L[2, 1], L[3, 2], L[4, 3] = 0.5, -0.3, 0.8, 0.2  # a Markov chain
    F = torch.linalg.inv(L.T @ torch.diag(positive(5)) @ L)
    assert_close(network(F, [[-1], [0], [1], [2], [3]]).to_dense(), F, **EXACT)
    reverse = network(F, [[1], [2], [3], [4], [-1]])  # the order of the indices is irrelevant
    assert_close(reverse.to_dense(), F, **EXACT)


def test_a_sparse_precision_agrees_with_the_matrix_on_every_block_of_parents_that_are_connected() -> None:
    C, M = sparse_precision(3)
    assert isinstance(C, SparsePrecision)
    for i, pa in enumerate(C.parents.tolist()):
        own = [i, *(j for j in pa if j >= 0)]
        assert_close(M[own][:, own], C.blocks[i, : len(own), : len(own)], **EXACT)


def test_a_sparse_precision_keeps_the_regressions_of_f_but_not_its_entries_on_parents_that_are_not_connected() -> None:
    F = definite(3)
    C = network(F, [[-1], [-1], [0, 1]])
    M, pa = C.to_dense(), [0, 1]
    assert_close(M[2, pa] @ torch.linalg.inv(M[pa][:, pa]), F[2, pa] @ torch.linalg.inv(F[pa][:, pa]), **EXACT)
    left = [S[2, 2] - S[2, pa] @ torch.linalg.inv(S[pa][:, pa]) @ S[pa, 2] for S in (M, F)]
    assert_close(*left, **EXACT)
    assert_close(M[0, 1], torch.zeros((), dtype=torch.float64), **EXACT)
    assert abs(F[0, 1]) > 1e-2 and abs(M[2, 0] - F[2, 0]) > 1e-3
    connected = network(F, [[-1], [0], [0, 1]])
    assert_close(connected.to_dense(), F, **EXACT)


def test_the_inverse_of_a_singular_operator_samples_the_pseudo_inverse() -> None:
    U = draw(2, 4)
    C = LowRank(U)
    R = C.inverse_root(1.0)(eye(4))
    assert_close(R @ R.T, torch.linalg.pinv(U.T @ U, hermitian=True), **EXACT)
    half = C.inverse_root(0.5)(eye(4))
    assert_close(half @ half.T, function(U.T @ U, lambda d: torch.where(d > 1e-9, d, torch.inf) ** -0.5), **EXACT)
