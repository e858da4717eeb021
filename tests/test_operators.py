"""Claims about operators, each for every structure:

- `to_dense` is the matrix written down by hand, `@`, `diagonal`, `trace`, `quadratic_form` and `logdet` are those of that matrix;
- a sample is R z with R R^T the matrix, so its covariance is right by construction, with no Monte-Carlo tolerance;
- `pack` is read by `torch.load(weights_only=True)` and `unpack` gives the same operator; `to` casts it;
- a vector of a wrong shape or dtype is refused with a sentence.

And for single ones: row-major vec, the order of Kronecker factors, exponents, coordinates of blocks, live operators.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.errors import InvalidCombination, UsageError
from precond.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerEigen,
    MatrixFree,
    Operator,
    RootShifted,
    Shifted,
    pack,
    unpack,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(*shape: int, seed: int = 0) -> Tensor:
    X = draw(*shape, shape[-1], seed=seed)
    return X @ X.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=X.dtype)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).abs() + 0.1


def root(A: Tensor, p: float) -> Tensor:
    d, U = torch.linalg.eigh(A)
    return U @ torch.diag(d**p) @ U.T


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def dense() -> tuple[Operator, Tensor]:
    A = definite(5)
    return Dense(A), A.clone()


def dense_stack() -> tuple[Operator, Tensor]:
    A = definite(3, 2)
    return Dense(A), torch.block_diag(A[0], A[1], A[2])


def diagonal() -> tuple[Operator, Tensor]:
    d = positive(4)
    return Diagonal(d), torch.diag(d)


def diagonal_stack() -> tuple[Operator, Tensor]:
    d = positive(3, 2)
    return Diagonal(d), torch.diag(d.flatten())


def kronecker() -> tuple[Operator, Tensor]:
    A, d, B = definite(2, seed=1), positive(3, seed=2), definite(2, seed=3)
    return Kronecker(A, d, B, scale=0.3), 0.3 * torch.kron(torch.kron(A, torch.diag(d)), B)


def kronecker_stack() -> tuple[Operator, Tensor]:
    B, a = definite(2, 3, seed=1), positive(2, 2, seed=2)
    return Kronecker(B, Diagonal(a)), torch.block_diag(*(torch.kron(B[i], torch.diag(a[i])) for i in range(2)))


def kronecker_power() -> tuple[Operator, Tensor]:
    B, A, d = definite(2, seed=1), definite(3, seed=2), positive(2, seed=3)
    scale = torch.tensor(2.0, dtype=torch.float64)
    return Kronecker(B, A, d, exponent=0.25, scale=scale), 2 * torch.kron(torch.kron(root(B, 0.25), root(A, 0.25)), torch.diag(d**0.25))


def kronecker_eigen() -> tuple[Operator, Tensor]:
    U, s = torch.linalg.qr(draw(3, 3))[0].contiguous(), positive(2, 3)
    V = torch.kron(eye(2), U)
    return KroneckerEigen((None, U), s), V @ torch.diag(s.flatten()) @ V.T


def shifted() -> tuple[Operator, Tensor]:
    C, M = kronecker()
    return Shifted(C, 0.7), M + 0.7 * eye(len(M))


def root_shifted() -> tuple[Operator, Tensor]:
    C, M = kronecker_stack()
    return RootShifted(C, 0.7, 0.5), root(root(M, 0.5) + 0.7 * eye(len(M)), 2)


def matrix_free() -> tuple[Operator, Tensor]:
    A = definite(4)
    return MatrixFree(lambda v: A @ v, 4, torch.float64, "cpu"), A.clone()


def live_shifted() -> tuple[Operator, Tensor]:
    C, M = matrix_free()
    return Shifted(C, torch.tensor(0.5, dtype=torch.float64)), M + 0.5 * eye(4)


def blocks() -> tuple[Operator, Tensor]:
    A, d = definite(2), positive(3)
    M = torch.zeros(6, 6, dtype=torch.float64)
    where, other = torch.tensor([4, 1]), torch.tensor([0, 5, 2])
    M[where[:, None], where] = A
    M[other, other] = d
    return BlockDiagonal({"a": Dense(A), "kind": Diagonal(d)}, {"a": where, "kind": other}, n=6), M  # coordinate 3 is in no block


def consecutive() -> tuple[Operator, Tensor]:
    (C, M), (D, N) = kronecker(), dense()
    return BlockDiagonal({"0": C, "1": D}), torch.block_diag(M, N)


MAKERS: dict[str, Callable[[], tuple[Operator, Tensor]]] = {
    f.__name__: f
    for f in (
        dense,
        dense_stack,
        diagonal,
        diagonal_stack,
        kronecker,
        kronecker_stack,
        kronecker_power,
        kronecker_eigen,
        shifted,
        root_shifted,
        matrix_free,
        live_shifted,
        blocks,
        consecutive,
    )
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
LIVE = {"matrix_free", "live_shifted"}


@every
def test_is_the_matrix_written_by_hand(make: Callable[[], tuple[Operator, Tensor]]) -> None:
    C, M = make()
    assert C.shape == M.shape and C.n == len(M) and C.dtype == torch.float64 and C.device.type == "cpu"
    assert_close(C.to_dense(), M, **EXACT)
    assert_close(C.diagonal(), M.diagonal(), **EXACT)
    assert_close(C.trace(), M.trace(), **EXACT)


@every
def test_products_with_a_vector_with_columns_and_with_none(make: Callable[[], tuple[Operator, Tensor]]) -> None:
    C, M = make()
    V = draw(len(M), 3, seed=7)
    assert_close(C @ V, M @ V, **EXACT)
    assert_close(C @ V[:, 0], M @ V[:, 0], **EXACT)
    assert_close(C @ V.T.contiguous().T, M @ V, **EXACT)  # strides do not matter
    assert (C @ V[:, :0]).shape == (len(M), 0) if not C.live else True
    assert_close(C.quadratic_form(V[:, 0]), V[:, 0] @ M @ V[:, 0], **EXACT)
    assert_close(C.quadratic_form(V), torch.stack([v @ M @ v for v in V.T]), **EXACT)


@every
def test_wrong_vectors_are_refused_with_a_sentence(make: Callable[[], tuple[Operator, Tensor]]) -> None:
    C, M = make()
    n = len(M)
    for v in (draw(n + 1), draw(1, n + 1), draw(n, 1, 1), torch.tensor(1.0, dtype=torch.float64)):
        with pytest.raises(ValueError, match="multiplies a vector"):
            C @ v
    with pytest.raises(TypeError, match=r"cast one with \.to"):
        C @ draw(n).float()


@every
def test_logdet(make: Callable[[], tuple[Operator, Tensor]], request: pytest.FixtureRequest) -> None:
    C, M = make()
    if C.live:
        with pytest.raises(InvalidCombination, match="no eigendecomposition"):
            C.logdet()
    elif make is blocks:  # one coordinate is in no block: singular
        assert C.logdet() == -torch.inf
    else:
        assert_close(C.logdet(), torch.linalg.slogdet(M).logabsdet, **EXACT)


@every
def test_covariance_of_samples_is_the_matrix_by_construction(make: Callable[[], tuple[Operator, Tensor]]) -> None:
    C, M = make()
    if C.live:
        with pytest.raises(NotImplementedError, match="no square root"):
            C.sample()
        return
    R = C._colour(eye(C.noise))
    assert_close(R @ R.T, M, **EXACT)
    z = torch.randn(C.noise, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(C.sample(torch.Generator().manual_seed(3)), (R @ z)[:, 0], **EXACT)


@every
def test_packs_to_what_torch_loads_with_weights_only(make: Callable[[], tuple[Operator, Tensor]]) -> None:
    C, M = make()
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
def test_casts_all_or_refuses(make: Callable[[], tuple[Operator, Tensor]]) -> None:
    C, M = make()
    if C.live:
        with pytest.raises(UsageError, match="cannot be cast"):
            C.to(dtype=torch.float32)
        return
    single = C.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert {t.dtype for t in single.tensors() if t.is_floating_point()} == {torch.float32}
    assert_close(single.to_dense(), M.float(), rtol=1e-4, atol=1e-5)  # a fourth power through a float32 eigendecomposition
    assert (single @ torch.ones(C.n)).dtype == torch.float32


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
    C, M = kronecker_power()
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
    C, _ = diagonal()
    d = C.diagonal()
    assert_close(RootShifted(C, 0.3, 0.5).diagonal(), (d.sqrt() + 0.3) ** 2, **EXACT)
    with pytest.raises(AssertionError):  # negative: not the same as inside
        assert_close(RootShifted(C, 0.3, 0.5).diagonal(), d + 0.3, **EXACT)


def test_blocks_keep_their_names_and_refuse_what_does_not_fit() -> None:
    C, _ = blocks()
    assert isinstance(C, BlockDiagonal) and list(C.blocks) == ["a", "kind"]
    with pytest.raises(ValueError, match="positions of shape"):
        BlockDiagonal({"a": Diagonal(draw(2))}, {"a": torch.tensor([1])}, n=3)
    with pytest.raises(ValueError, match="more than n"):
        BlockDiagonal({"a": Diagonal(draw(2))}, n=1)
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonal({})


def test_live_blocks_are_filled_by_name() -> None:
    (C, M), (D, N) = matrix_free(), live_shifted()
    whole = BlockDiagonal({"x": C, "y": D, "z": Diagonal(torch.ones(1, dtype=torch.float64))})
    assert whole.live
    assert_close(unpack(pack(whole), live=whole).to_dense(), torch.block_diag(M, N, eye(1)), **EXACT)
    wrong = MatrixFree(lambda v: v, 3, torch.float64, "cpu")
    with pytest.raises(UsageError, match="3 coordinates"):
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
    ],
)
def test_shapes_that_are_no_operator_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
