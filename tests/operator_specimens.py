"""Random specimens of every operator in float64, each beside the dense matrix it stands for, written by hand: kron, loops, `eigh`.

`SPECIMENS` names, for every class of `precond.operators`, functions of a seed, which also draws the sizes. A class without one fails
`test_operators.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

import dense_secant
from precond.inversion import inverse
from precond.operators import (
    Absolute,
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
    MadePrecision,
    MatrixFree,
    Operator,
    Probed,
    Repeated,
    RootShifted,
    Secant,
    SecantKronecker,
    SecantMemory,
    Shifted,
    Sparse,
    SparsePrecision,
)
from precond.solvers import CG

Specimen = tuple[Operator, Tensor]
Maker = Callable[[int], Specimen]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(*shape: int, seed: int = 0) -> Tensor:
    X = draw(*shape, shape[-1], seed=seed)
    return X @ X.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=X.dtype)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).abs() + 0.1


def function(A: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f(A) by an eigendecomposition of the whole matrix."""
    d, U = torch.linalg.eigh((A + A.T) / 2)
    return U @ torch.diag(f(d)) @ U.T


def root(A: Tensor, p: float) -> Tensor:
    return function(A, lambda d: d**p)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def sizes(seed: int, count: int, low: int = 2, high: int = 4) -> list[int]:
    """`count` sizes drawn by the seed."""
    return [random.Random(100 * seed + i).randint(low, high) for i in range(count)]


# --- dense, diagonal


def dense(seed: int) -> Specimen:
    A = definite(sizes(seed, 1, 3, 6)[0], seed=seed)
    return Dense(A), A.clone()


def dense_stack(seed: int) -> Specimen:
    A = definite(*sizes(seed, 2), seed=seed)
    return Dense(A), torch.block_diag(*A)


def diagonal(seed: int) -> Specimen:
    d = positive(*sizes(seed, 1), seed=seed)
    return Diagonal(d), torch.diag(d)


def diagonal_stack(seed: int) -> Specimen:
    d = positive(*sizes(seed, 2), seed=seed)
    return Diagonal(d), torch.diag(d.flatten())


def secant(seed: int) -> Specimen:
    C, M = dense(seed)
    return Secant(M.clone(), draw(C.n), draw(C.n, seed=1)), M


def secant_memory(seed: int) -> Specimen:
    """Two pairs of a definite matrix after one place without a pair."""
    n, A = 5, definite(5, seed=seed)
    S, B = draw(2, n, seed=seed + 1), 0.7 * eye(n)
    for s in S:
        B, _ = dense_secant.direct(B, s, A @ s, dense_secant.Rule(powell=0.0), False)
    none = torch.zeros(1, n, dtype=A.dtype)
    return SecantMemory(torch.cat([none, S]), torch.cat([none, S @ A]), torch.tensor(0.7, dtype=A.dtype)), B


def probed(seed: int) -> Specimen:
    C, M = dense(seed)
    return Probed(M.clone(), draw(C.n)), M


# --- Kronecker products


def kronecker(seed: int) -> Specimen:
    a, b, c = sizes(seed, 3, 2, 3)
    A, d, B = definite(a, seed=seed + 1), positive(b, seed=seed + 2), definite(c, seed=seed + 3)
    return Kronecker(A, d, B, scale=0.3), 0.3 * torch.kron(torch.kron(A, torch.diag(d)), B)


def kronecker_stack(seed: int) -> Specimen:
    b, n, m = sizes(seed, 3, 2, 3)
    B, a = definite(b, n, seed=seed + 1), positive(b, m, seed=seed + 2)
    return Kronecker(B, Diagonal(a)), torch.block_diag(*(torch.kron(B[i], torch.diag(a[i])) for i in range(b)))


def kronecker_power(seed: int) -> Specimen:
    a, b, c = sizes(seed, 3, 2, 3)
    B, A, d = definite(a, seed=seed + 1), definite(b, seed=seed + 2), positive(c, seed=seed + 3)
    scale = torch.tensor(2.0, dtype=torch.float64)
    return Kronecker(B, A, d, exponent=0.25, scale=scale), 2 * torch.kron(torch.kron(root(B, 0.25), root(A, 0.25)), torch.diag(d**0.25))


def secant_kronecker_memory(seed: int) -> Specimen:
    (B, M), A = secant_memory(seed), definite(2, seed=seed + 3)
    return SecantKronecker(B, Probed(A, draw(2))), torch.kron(M, A)


def secant_kronecker(seed: int) -> Specimen:
    a, b = sizes(seed, 2)
    A, B = definite(a, seed=seed + 1), definite(b, seed=seed + 2)
    return SecantKronecker(Secant(B, draw(b), draw(b, seed=1)), A), torch.kron(B, A)


def kronecker_eigen(seed: int) -> Specimen:
    a, b = sizes(seed, 2)
    U, s = torch.linalg.qr(draw(b, b, seed=seed))[0].contiguous(), positive(a, b, seed=seed)
    V = torch.kron(eye(a), U)
    return KroneckerEigen((None, U), s), V @ torch.diag(s.flatten()) @ V.T


def kronecker_sum(seed: int) -> Specimen:
    a, b = sizes(seed, 2)
    F = [definite(n, seed=seed + i) for i, n in enumerate((a, b, a))]
    d = positive(b, seed=seed)
    terms = Kronecker(F[0], F[1], scale=0.3), Kronecker(F[2], d, exponent=0.5)
    return KroneckerSum(*terms, scale=2.0), 0.6 * torch.kron(F[0], F[1]) + 2 * torch.kron(root(F[2], 0.5), torch.diag(d.sqrt()))


def kronecker_axes(seed: int) -> Specimen:
    a, b, c = sizes(seed, 3, 2, 3)
    A, d, B = definite(a, seed=seed + 1), positive(b, seed=seed + 2), definite(c, seed=seed + 3)
    M = torch.kron(A, eye(b * c)) + torch.kron(torch.kron(eye(a), torch.diag(d)), eye(c)) + torch.kron(eye(a * b), B)
    return KroneckerSum(A, d, B, scale=0.7), 0.7 * M


def kronecker_axes_stack(seed: int) -> Specimen:
    b, n, m = sizes(seed, 3, 2, 3)
    A, B = definite(b, n, seed=seed + 1), definite(b, m, seed=seed + 2)
    return KroneckerSum(A, B), torch.block_diag(*(torch.kron(A[i], eye(m)) + torch.kron(eye(n), B[i]) for i in range(b)))


def kronecker_power_mean(seed: int) -> Specimen:
    a, b = sizes(seed, 2)
    L, R = definite(a, seed=seed + 1), definite(b, seed=seed + 2)
    mean = (torch.kron(root(L, -0.25), eye(b)) + torch.kron(eye(a), root(R, -0.25))) / 2  # CASPR: C^(-1/2) = mean^2
    return KroneckerSum(L, R, exponent=-0.25, scale=2.0**4), root(mean, -4)


# --- rows


def low_rank(seed: int) -> Specimen:
    r, p = sizes(seed, 2, 2, 6)
    U = draw(r, p, seed=seed)
    return LowRank(U), U.T @ U


def low_rank_full(seed: int) -> Specimen:
    p = sizes(seed, 1)[0]
    U, w = draw(p + 3, p, seed=seed), positive(p + 3, seed=seed)
    return LowRank(U, w, gram=U @ U.T), U.T @ torch.diag(w) @ U


def low_rank_weighted(seed: int) -> Specimen:
    r, p = sizes(seed, 2)
    U, w = draw(r, p + r, seed=seed), positive(r, seed=seed)
    return LowRank(U, w), U.T @ torch.diag(w) @ U


def low_rank_indefinite(seed: int) -> Specimen:
    r, p = sizes(seed, 2)
    U, w = draw(r, p + r, seed=seed), draw(r, seed=seed)
    w[0], w[-1] = 1.0, -2.0
    return LowRank(U, w), U.T @ torch.diag(w) @ U


def low_rank_centred(seed: int) -> Specimen:
    r, p = sizes(seed, 2)
    U = draw(r, p + r, seed=seed)
    deviations = U - U.mean(0)
    return LowRank(U, eye(r) - torch.full((r, r), 1 / r, dtype=U.dtype)), deviations.T @ deviations


def low_rank_stack(seed: int) -> Specimen:
    b, r, p = sizes(seed, 3, 2, 3)
    U, w = draw(b, r, p + 1, seed=seed), positive(b, r, seed=seed)
    return LowRank(U, w), torch.block_diag(*(U[i].T @ torch.diag(w[i]) @ U[i] for i in range(b)))


def outer_rows(a: Tensor, g: Tensor) -> Tensor:
    """(n, out * in), by loops: row k N + i is sum_r g_kir a_ir^T."""
    N, R = a.shape[:2]
    rows = []
    for index, gradient in enumerate(g):
        total = torch.zeros(g.shape[-1], a.shape[-1], dtype=g.dtype)
        for r in range(R):
            total += torch.outer(gradient[r], a[index % N, r])
        rows.append(total.flatten())
    return torch.stack(rows)


def gram(seed: int) -> Specimen:
    """A Linear layer with K columns an example, one with shared positions, and plain rows."""
    N, K, R, wide, out, p = sizes(seed, 6, 2, 3)
    n = N * K
    one, shared = (draw(N, 1, wide, seed=1), draw(n, 1, out, seed=2)), (draw(n, R, 2, seed=3), draw(n, R, 3, seed=4))
    plain = draw(n, p, seed=5)
    U = torch.cat([outer_rows(*one), outer_rows(*shared), plain], 1)
    return Gram([one, shared, plain]), U.T @ U


def gram_centred(seed: int) -> Specimen:
    n, R, wide, out = sizes(seed, 4)
    a, g, c = draw(n, R, wide, seed=1), draw(n, R, out, seed=2), positive(n, seed=3)
    c = c / c.norm()
    U = outer_rows(a, g)
    return Gram([(a, g)], eye(n) - torch.outer(c, c)), U.T @ U - torch.outer(U.T @ c, U.T @ c)


def gram_stack(seed: int) -> Specimen:
    """Blocks of units: the inputs are shared, the output gradients are not."""
    b, n, R, wide, out = sizes(seed, 5, 2, 3)
    a, g, w = draw(1, n, R, wide, seed=1), draw(b, n, R, out, seed=2), positive(b, n, seed=3)
    rows = [outer_rows(a[0], g[i]) for i in range(b)]
    return Gram([(a, g)], w), torch.block_diag(*(U.T @ torch.diag(w[i]) @ U for i, U in enumerate(rows)))


def gram_embedding(seed: int) -> Specimen:
    """An embedding beside a layer; some of its indices meet within an example and between examples."""
    N, K, R, width, out = sizes(seed, 5, 2, 3)
    index, g = torch.randint(0, 3, (N, R), generator=torch.Generator().manual_seed(seed)), draw(K * N, R, width, seed=1)
    other = draw(N, 1, 2, seed=2), draw(K * N, 1, out, seed=3)
    rows = torch.zeros(K * N, 4, width, dtype=torch.float64)
    for row in range(K * N):
        for r in range(R):
            rows[row, index[row % N, r]] += g[row, r]
    U = torch.cat([rows.flatten(1), outer_rows(*other)], 1)
    return Gram([(index, g, 4), other]), U.T @ U


def low_rank_eigen(seed: int) -> Specimen:
    (C, M) = low_rank_weighted(seed)
    return C.spectral().map(lambda s: s + 0.3), M + 0.3 * eye(C.n)


def low_rank_eigen_stack(seed: int) -> Specimen:
    (C, M) = gram_stack(seed)
    return C.spectral().map(lambda s: (s + 0.3).sqrt()), function(M, lambda d: (d + 0.3).sqrt())


# --- sparse


def sparse(seed: int) -> Specimen:
    n = sizes(seed, 1, 3, 5)[0]
    A, mask = draw(n, n, seed=seed), torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    lower = (A * mask).tril()
    index = lower.nonzero().T
    flipped = index.flip(0) if seed % 2 else index  # either triangle
    return Sparse(flipped, lower[index[0], index[1]], n), lower + lower.tril(-1).T


def sparse_precision(seed: int) -> Specimen:
    n = sizes(seed, 1, 3, 5)[0]
    F, order = definite(n, seed=seed), torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    parents = torch.full((n, 2), -1)
    blocks = torch.full((n, 3, 3), 7.0, dtype=torch.float64)  # what is not read may be anything
    IB, D = eye(n), torch.zeros(n, dtype=torch.float64)
    for place, i in enumerate(order):  # up to two of the coordinates before it in a random order
        pa = sorted(order[max(0, place - 2) : place])
        parents[i, : len(pa)] = torch.tensor(pa, dtype=torch.long)
        own = [i, *pa]
        blocks[i, : len(own), : len(own)] = F[own][:, own]
        coefficients = torch.linalg.solve(F[pa][:, pa], F[pa, i]) if pa else torch.zeros(0, dtype=F.dtype)
        for j, c in zip(pa, coefficients, strict=True):
            IB[i, j] -= c
        D[i] = F[i, i] - (F[i, pa] @ coefficients if pa else 0)
    return SparsePrecision(blocks, parents), torch.linalg.inv(IB.T @ torch.diag(1 / D) @ IB)


def made_precision(seed: int) -> Specimen:
    C, M = sparse_precision(seed)
    assert isinstance(C, SparsePrecision)
    return C.materialise(), M


# --- wrappers


def shifted(seed: int) -> Specimen:
    C, M = kronecker(seed)
    return Shifted(C, 0.7), M + 0.7 * eye(len(M))


def shifted_gram(seed: int) -> Specimen:
    C, M = gram(seed)
    return Shifted(C, torch.tensor(0.7, dtype=torch.float64)), M + 0.7 * eye(len(M))


def root_shifted(seed: int) -> Specimen:
    C, M = kronecker_stack(seed)
    return RootShifted(C, 0.7, 0.5), root(root(M, 0.5) + 0.7 * eye(len(M)), 2)


def root_shifted_low_rank(seed: int) -> Specimen:
    C, M = low_rank_weighted(seed)
    return RootShifted(C, 0.7, 0.5), function(M, lambda d: (torch.where(d > 1e-9, d, 0).sqrt() + 0.7) ** 2)


def matrix_free(seed: int) -> Specimen:
    A = definite(sizes(seed, 1)[0], seed=seed)
    return MatrixFree(lambda v: A @ v, len(A), torch.float64, "cpu"), A.clone()


def absolute(seed: int) -> Specimen:
    X = draw(sizes(seed, 1)[0], 3, seed=seed)
    A = X @ torch.diag(torch.tensor([1.0, -1, 2], dtype=X.dtype)) @ X.T + 0.3 * torch.eye(len(X), dtype=X.dtype)
    return Absolute(Dense(A)), function(A, torch.abs)


def live_shifted(seed: int) -> Specimen:
    C, M = matrix_free(seed)
    return Shifted(C, torch.tensor(0.5, dtype=torch.float64)), M + 0.5 * eye(C.n)


def blocks(seed: int) -> Specimen:
    A, d = definite(2, seed=seed), positive(3, seed=seed)
    M = torch.zeros(6, 6, dtype=torch.float64)
    where, other = torch.tensor([4, 1]), torch.tensor([0, 5, 2])
    M[where[:, None], where] = A
    M[other, other] = d
    return BlockDiagonal({"a": Dense(A), "kind": Diagonal(d)}, {"a": where, "kind": other}, n=6), M  # coordinate 3 is in no block


def repeated(seed: int) -> Specimen:
    (count,) = sizes(seed, 1)
    C, M = dense(seed)
    return Repeated(C, count), torch.block_diag(*[M for _ in range(count)])


def repeated_stack(seed: int) -> Specimen:
    C, M = kronecker_stack(seed)
    return Repeated(C, 2), torch.block_diag(M, M)


def consecutive(seed: int) -> Specimen:
    made = kronecker(seed), dense(seed), shifted_gram(seed)
    return BlockDiagonal({str(i): C for i, (C, _) in enumerate(made)}), torch.block_diag(*(M for _, M in made))


# --- inverses


def inverse_dense(seed: int) -> Specimen:
    C, M = dense_stack(seed)
    return inverse(C, solver="cholesky", damping=0.2), torch.linalg.inv(M + 0.2 * eye(len(M)))


def inverse_root(seed: int) -> Specimen:
    C, M = kronecker_axes(seed)
    return inverse(C, solver="eigen", damping=0.2, power=0.5), root(M + 0.2 * eye(len(M)), -0.5)


def inverse_low_rank(seed: int) -> Specimen:
    C, M = low_rank_weighted(seed)
    return inverse(C, solver="smw", damping=0.2), torch.linalg.inv(M + 0.2 * eye(len(M)))


def inverse_sparse_precision(seed: int) -> Specimen:
    """No solver is needed to say what an inverse is: any that applies it."""
    C, M = sparse_precision(seed)
    assert isinstance(C, SparsePrecision)
    return Inverse(Network(), {}, C, 1.0, C), torch.linalg.inv(M)


class Network:
    """Applies the inverse of a `SparsePrecision`."""

    def apply(self, state: dict[str, object], vector: Tensor, operator: Operator | None = None) -> tuple[Tensor, dict[str, object]]:
        assert isinstance(operator, SparsePrecision)
        return operator.inverse_matmul(vector), state


def inverse_live(seed: int) -> Specimen:
    C, M = matrix_free(seed)
    return inverse(C, solver=CG(tolerance=1e-14), damping=0.2), torch.linalg.inv(M + 0.2 * eye(len(M)))


def inverse_blocks(seed: int) -> Specimen:
    (C, M), (D, N) = dense(seed), shifted_gram(seed)
    whole = BlockDiagonal({"a": C, "b": D})
    inverted = torch.block_diag(torch.linalg.inv(M + 0.2 * eye(len(M))), torch.linalg.inv(N + 0.2 * eye(len(N))))
    return inverse(whole, solver="eigen", damping=0.2), inverted


SPECIMENS: dict[type[Operator], tuple[Maker, ...]] = {
    Absolute: (absolute,),
    BlockDiagonal: (blocks, consecutive),
    Dense: (dense, dense_stack),
    Diagonal: (diagonal, diagonal_stack),
    Gram: (gram, gram_centred, gram_stack, gram_embedding),
    Inverse: (inverse_dense, inverse_root, inverse_low_rank, inverse_sparse_precision, inverse_live),
    InverseBlockDiagonal: (inverse_blocks,),
    Kronecker: (kronecker, kronecker_stack, kronecker_power),
    KroneckerEigen: (kronecker_eigen,),
    KroneckerSum: (kronecker_sum, kronecker_axes, kronecker_axes_stack, kronecker_power_mean),
    LowRank: (low_rank, low_rank_full, low_rank_weighted, low_rank_indefinite, low_rank_centred, low_rank_stack),
    LowRankEigen: (low_rank_eigen, low_rank_eigen_stack),
    MadePrecision: (made_precision,),
    MatrixFree: (matrix_free,),
    Probed: (probed,),
    Repeated: (repeated, repeated_stack),
    RootShifted: (root_shifted, root_shifted_low_rank),
    Secant: (secant,),
    SecantKronecker: (secant_kronecker, secant_kronecker_memory),
    SecantMemory: (secant_memory,),
    Shifted: (shifted, shifted_gram, live_shifted),
    Sparse: (sparse,),
    SparsePrecision: (sparse_precision,),
}
NO_EIGENDECOMPOSITION: tuple[Maker, ...] = (matrix_free, live_shifted, inverse_live, kronecker_sum, sparse)
"""No logdet: each must say so."""
NO_ROOT: tuple[Maker, ...] = (matrix_free, live_shifted, inverse_live, sparse)
"""No sample: each must say so."""
INDEFINITE: tuple[Maker, ...] = (low_rank_indefinite, sparse)
