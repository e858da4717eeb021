"""Claims about `kron_eigen`, the exact diagonal in a Kronecker eigenbasis (the oracle's cells of basis_of="io" are walked by test_curvature).

- Over the bases of `kron_dim` it is, for every tensor of any order, the oracle's matrix; dimensions that are too long keep the identity.
- Identity 17: its trace is that of the exact block, shared positions included, where K-FAC's is not; its spectrum is the diagonal of
  U^T F U; it is at least as near to the block as K-FAC, nearer where K-FAC is not exact, and equal to it where it is; no other diagonal in
  this basis is nearer.
- Held at the identity with Adam's history, power and damping it is `torch.optim.Adam`; in another basis it is not.
- A spectrum that is carried over is the diagonal, in the new basis, of the matrix it stood for (eigh), or is permuted (qr); the sum stays.
- Orthogonal iteration takes the oracle's steps and ends at the eigenvectors. Bases have no sign left to chance.
- "after": the first observation only makes a basis. Steps before the start may do nothing.
- A history of any kind, micro-batches, and a batch of NaN keep what they say. Wrong options are refused.

Bases are never compared with those of the oracle, only the matrices that they make.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import dense_eigen
import precond
from dense_cells import ALL
from nets import labels, normal, seeded
from precond.representations import KronEigen
from precond.representations.eigenbasis import carry, diagonalise, first_basis, iterate
from references import ekfac
from references.common import NETWORKS
from training import accumulate, batches, differ, fit, make, matrix_of, net, plain, same, sgd, theta

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
DIM = KronEigen(basis_of="dim")


def curve(case: Any, matrix: str, repr: Any) -> Any:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr)


def spd(*shape: int, seed: int = 0) -> Tensor:
    """Random positive definite matrices (..., n, n) with spread eigenvalues."""
    X = normal(*shape, shape[-1], seed=seed)
    return X @ X.mT + torch.diag(torch.arange(1.0, shape[-1] + 1, dtype=X.dtype))


def dense_basis(operator: Any, block: int = 0) -> Tensor:
    """The basis that an operator says it has, as one matrix."""
    sizes = operator.spectrum.shape[1:]
    parts = [torch.eye(n, dtype=torch.float64) if U is None else U[block].contiguous() for U, n in zip(operator.bases, sizes, strict=True)]
    return reduce(torch.kron, parts)


# --- the bases of kron_dim


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "batched_empirical_fisher", "gradient_covariance"])
@pytest.mark.parametrize("name", ["mlp", "conv", "embedder", "transformer"])
def test_over_dimensions_it_is_the_matrix_of_the_oracle(name: str, matrix: str) -> None:
    case = ALL[name]
    M, F = curve(case, matrix, DIM).to_dense(), dense_cells.held(case, matrix)
    places = dense.positions(case.make())
    close(dense.project_tensor(M, case.make()), M)
    for parameter, factors in dense_cells.kron_dim_factors(case, matrix).items():
        at = places[parameter]
        close(M[at, at], dense_eigen.corrected(factors, F[at, at]))


def test_a_tensor_of_four_dimensions_has_four_bases() -> None:
    blocks = curve(ALL["conv"], "ggn", DIM).blocks
    assert max(len(block.bases) for block in blocks.values()) == 4
    assert all(U is not None for block in blocks.values() for U in block.bases)


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_without_a_basis_it_is_the_diagonal(name: str) -> None:
    got = curve(ALL[name], "ggn", KronEigen(basis_of="dim", max_dim=0))
    close(got.to_dense(), curve(ALL[name], "ggn", "diagonal").to_dense())
    assert (got.to_dense() - curve(ALL[name], "ggn", DIM).to_dense()).norm() > 1e-2


def test_a_long_dimension_keeps_the_identity_and_a_vector_may() -> None:
    case = ALL["mlp"]  # weights (5, 4), (4, 5), (3, 4)
    F, factors = dense_cells.held(case, "ggn"), dense_cells.kron_dim_factors(case, "ggn")
    C = curve(case, "ggn", KronEigen(basis_of="dim", max_dim=4, vectors=False))
    M, places = C.to_dense(), dense.positions(case.make())
    for parameter, each in factors.items():
        kept = [torch.eye(len(f), dtype=f.dtype) if len(f) > 4 or len(each) == 1 else f for f in each]
        close(M[places[parameter], places[parameter]], dense_eigen.corrected(kept, F[places[parameter], places[parameter]]))
    assert [U is None for U in C.blocks["0.weight"].bases] == [True, False]
    assert C.blocks["4.bias"].bases == (None,)


# --- identity 17


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_17_the_trace_is_exact_and_the_error_at_most_that_of_kfac(name: str, sharing: Any) -> None:
    case, nearer = ALL[name], []
    exact, corrected = curve(case, "ggn", "layer"), curve(case, "ggn", KronEigen(sharing=sharing))
    kfac = curve(case, "ggn", precond.representations.KronIO(sharing=sharing))
    for layer, block in corrected.blocks.items():
        if block.kind != "KroneckerEigen":
            continue
        at = block_order(corrected, exact, layer)
        F = exact.blocks[layer].to_dense()[at][:, at]
        close(block.trace(), F.trace())
        ours, theirs = (block.to_dense() - F).norm(), (kfac.blocks[layer].to_dense() - F).norm()
        assert ours <= theirs * (1 + 1e-12)
        nearer.append(float(ours / theirs))
        size = block.n // len(block.spectrum)
        for b, S in enumerate(block.spectrum):
            U, inside = dense_basis(block, b), slice(b * size, (b + 1) * size)
            close(U.T @ U, torch.eye(size, dtype=U.dtype))
            close(S.flatten(), dense_eigen.spectrum(U, F[inside, inside]))
        other = precond.operators.KroneckerEigen(block.bases, block.spectrum + 1e-3 * normal(*block.spectrum.shape, seed=4))
        assert (other.to_dense() - F).norm() > ours
    assert min(nearer) < 0.95, "K-FAC is not exact here"
    assert abs(float(kfac.trace() / exact.trace()) - 1) > 1e-3, "nor is its trace"


def block_order(ours: Any, theirs: Any, layer: str) -> Tensor:
    """Where the coordinates of our block are in theirs."""
    return torch.stack([torch.nonzero(theirs.positions[layer] == p).squeeze() for p in ours.positions[layer]])


def test_17_it_is_kfac_where_kfac_is_exact() -> None:
    linear = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False)))
    data, kinds = (nn.MSELoss(), normal(6, 4), normal(6, 3, seed=1)), ("layer", "kron_io", "kron_eigen")
    exact, kfac, ours = (precond.curvature(linear, *data, matrix="ggn", repr=repr).to_dense() for repr in kinds)
    close(kfac, exact)
    close(ours, exact)
    one = ALL["mlp"]
    exact, kfac, ours = (
        precond.curvature(one.make(), one.criterion, one.inputs[:1], one.targets[:1], matrix="empirical_fisher", repr=repr).to_dense()
        for repr in kinds
    )
    close(kfac, exact)
    close(ours, exact)
    assert exact.norm() > 1e-2


@pytest.mark.parametrize("solver", ["elementwise", "eigen"])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_damping_is_added_to_the_corrected_diagonal(solver: str, power: float) -> None:
    C = curve(ALL["conv"], "ggn", "kron_eigen")
    for block in C.blocks.values():
        if block.kind == "KroneckerEigen":
            v = normal(block.n, seed=2)
            values, vectors = torch.linalg.eigh(block.to_dense() + 0.3 * torch.eye(block.n, dtype=v.dtype))
            close(precond.inverse(block, solver=solver, damping=0.3, power=power) @ v, vectors @ (values**-power * (vectors.T @ v)))


# --- the basis and what is carried


@pytest.mark.parametrize("shape", [(1, 4), (1, 3, 4), (2, 3, 2), (1, 2, 3, 2)])
def test_a_carried_spectrum_is_the_diagonal_of_the_matrix_it_stood_for(shape: tuple[int, ...]) -> None:
    stack, sizes = shape[0], shape[1:]
    old = [first_basis(spd(stack, n, seed=m)) for m, n in enumerate(sizes)]
    renewed = [diagonalise(spd(stack, n, seed=10 + m), U) for m, (n, U) in enumerate(zip(sizes, old, strict=True))]
    S = normal(3, torch.Size(shape).numel(), seed=9).square()  # as a window holds it
    carried = carry(S, [change for _, change in renewed], shape)
    assert (carried - S).norm() > 0.1
    for before, after in zip(S.reshape(3, stack, -1), carried.reshape(3, stack, -1), strict=True):
        for b in range(stack):
            U, V = (reduce(torch.kron, [each[b].contiguous() for each in bases]) for bases in (old, [new for new, _ in renewed]))
            close(after[b], dense_eigen.spectrum(V, dense_eigen.matrix(U, before[b])))
            close(after[b].sum(), before[b].sum())


def test_a_mode_without_a_basis_is_not_touched() -> None:
    S = normal(12, seed=1)
    P = torch.eye(4, dtype=S.dtype)[[2, 0, 3, 1]].unsqueeze(0)
    assert torch.equal(carry(S, [None, P], (1, 3, 4)), S.view(3, 4)[:, [2, 0, 3, 1]].flatten())


def test_orthogonal_iteration_takes_the_steps_of_the_oracle_and_ends_at_the_eigenvectors() -> None:
    F = spd(5, seed=3)
    Q = torch.linalg.qr(normal(5, 5, seed=4)).Q
    S, weights = normal(5, seed=5), torch.arange(1.0, 6.0, dtype=F.dtype)
    for step in range(200):
        (ours,), (change,) = iterate(F.unsqueeze(0), Q.unsqueeze(0))
        theirs, order = dense_eigen.iterate(F, Q)
        close(dense_eigen.matrix(ours, weights), dense_eigen.matrix(theirs, weights))
        assert torch.equal(change @ S, S[order])
        assert step > 0 or order != sorted(order)
        Q = ours
    rotated = Q.T @ F @ Q
    close(rotated, rotated.diagonal().diag())
    close(rotated.diagonal(), torch.linalg.eigvalsh(F).flip(0))


def test_a_basis_has_no_sign_left_to_chance() -> None:
    F = spd(2, 4)
    for U in (first_basis(F), diagonalise(F, first_basis(F))[0], iterate(F, first_basis(F))[0]):
        assert bool((U.gather(-2, U.abs().argmax(-2, keepdim=True)) > 0).all())


@pytest.mark.parametrize("basis", ["eigh", "qr"])
@pytest.mark.parametrize("history", ["local", 0.8, precond.history.Sum(0.1), precond.history.Mean(), precond.history.Window(2)], ids=str)
def test_no_change_of_basis_changes_the_trace(history: Any, basis: Any) -> None:
    """The trace of the history of the diagonals themselves, whatever the bases were."""
    traces = []
    for repr in (KronEigen(basis_of="dim", max_dim=0), KronEigen(basis_of="dim", basis=basis, basis_interval=2)):
        preconditioner = make("empirical_fisher", repr, "elementwise", 1.0, history=history)
        fit(preconditioner, steps=5, optimizer=lambda model: sgd(model, lr=0.0))
        traces.append({name: C.trace() for name, C in preconditioner.operators.items()})
    assert traces[0].keys() == traces[1].keys()
    for name, trace in traces[0].items():
        close(trace, traces[1][name])


def test_a_spectrum_that_is_not_carried_would_be_seen() -> None:
    network = NETWORKS["mlp"]
    run = partial(ekfac.train, network, network.batches(4), [], interval=2, beta=0.9)
    differ(run(), run(carried=False), by=1e-5)


# --- training


def test_held_at_the_identity_it_is_adam() -> None:
    models = {}
    for name, repr in {"held": KronEigen(basis_of="dim", max_dim=0), "rotated": DIM}.items():
        models[name] = fit(precond.recipe("adam", repr=repr), steps=20, optimizer=lambda model: sgd(model, lr=1e-2))
    models["adam"] = fit(None, steps=20, optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-2))
    torch.testing.assert_close(theta(models["held"]), theta(models["adam"]), rtol=1e-12, atol=1e-12)
    differ(models["rotated"], models["adam"], by=1e-2)


def test_after_the_first_observation_there_is_only_a_basis() -> None:
    repr = KronEigen(basis_of="dim", update="after")
    preconditioner, model, criterion = make("batched_empirical_fisher", repr, "elementwise", 1e-2), net(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    other = fit(None, steps=1)
    with preconditioner.attach(model, criterion, optimizer):
        (first, second) = batches(2)
        plain(model, criterion, optimizer, *first)
        same(model, other)
        assert preconditioner.operators == {}
        g = dense.gradient(model, criterion, *second)[:20].view(5, 4)
        plain(model, criterion, optimizer, *second)
        C = preconditioner.operators["0.weight"]
        U, V = (basis[0] for basis in C.bases)
        close(C.spectrum[0], (U.T @ g @ V).square())
        assert (
            dense_eigen.corrected([g @ g.T, g.T @ g], torch.outer(g.flatten(), g.flatten())) - C.to_dense()
        ).norm() > 1e-3 * g.norm() ** 2
    with pytest.raises(precond.UsageError, match="makes a basis of its first observation"):
        curve(ALL["mlp"], "ggn", KronEigen(update="after"))


def test_before_the_start_nothing_moves() -> None:
    preconditioner, model, criterion = make(start_step=2, before_start="nothing"), net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    begin, path = theta(model), []
    with preconditioner.attach(model, criterion, optimizer):
        for x, y in batches(3):
            plain(model, criterion, optimizer, x, y)
            path.append(theta(model))
    assert torch.equal(path[0], begin)
    assert torch.equal(path[1], begin)
    differ(path[2], begin)
    with pytest.raises(ValueError, match="before_start='wait': choose one of 'gradient', 'nothing'"):
        make(before_start="wait")


@pytest.mark.parametrize("repr", [KronEigen(basis_interval=2), KronEigen(basis_of="dim", basis="qr")], ids=["io", "dim"])
def test_micro_batches_are_one_batch(repr: KronEigen) -> None:
    cell = ("empirical_fisher", repr, "elementwise", 0.1)
    same(fit(make(*cell, history=0.9), accumulate(2, 4), steps=2), fit(make(*cell, history=0.9), steps=2))


def test_a_batch_of_nan_leaves_basis_and_spectrum_as_they_were() -> None:
    criterion, found = nn.CrossEntropyLoss(), []
    for bad in (True, False):
        model = net()
        optimizer = sgd(model, lr=0.0)
        preconditioner = make("empirical_fisher", "kron_eigen", "elementwise", 0.1, history=0.5).attach(model, criterion, optimizer)
        for step, (x, y) in enumerate(batches(3)):
            if step != 1 or bad:
                plain(model, criterion, optimizer, x * float("nan") if step == 1 else x, y)
        assert preconditioner.diagnostics["observations_dropped"] == 4 * bad  # two blocks, two stages
        found.append(matrix_of(preconditioner, "0"))
    close(*found)
    assert found[0].norm() > 1e-3


def test_layers_without_factors_take_the_fallback_of_kfac() -> None:
    preconditioner = make("empirical_fisher", "kron_eigen", "elementwise", 0.1)
    build = lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)))  # noqa: E731
    fit(preconditioner, steps=1, build=build)
    assert "empirical_fisher x unit x eigen" in str(preconditioner.describe())
    assert [C.kind for C in preconditioner.operators.values()] == ["KroneckerEigen", "Dense", "KroneckerEigen"]
    assert preconditioner.diagnostics["refreshes"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis_of": "both"}, r"KronEigen\(basis_of='both'\): choose 'io' or 'dim'"),
        ({"basis": "svd"}, r"KronEigen\(basis='svd'\): choose 'eigh' or 'qr'"),
        ({"update": "never"}, "choose 'before' or 'after'"),
        ({"basis_interval": 0}, "a number of observations, 1 or more"),
        ({"basis_interval": 2.0}, "a number of observations, 1 or more"),
        ({"basis_of": "dim", "max_dim": -1}, "a length, 0 or more"),
        ({"max_dim": 8}, "modes and vectors belong to basis_of='dim'"),
        ({"vectors": False}, "modes and vectors belong to basis_of='dim'"),
        ({"basis_of": "dim", "sharing": "reduce"}, "sharing belongs to basis_of='io'"),
        ({"sharing": "both"}, "choose 'expand' or 'reduce'"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KronEigen(**options)


def test_examples_must_be_known() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(0, 1), nn.Linear(4, 3)))
    tokens = labels(5, 2, 3)
    with pytest.raises(precond.ObservationError, match=r"6 leading rows for a batch of 2 examples"):
        precond.curvature(model, nn.CrossEntropyLoss(), tokens, labels(3, 6), matrix="ggn", repr="kron_eigen")
