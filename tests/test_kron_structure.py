"""`kron_io` with structured factors, and `unit` by kernels, against the dense oracle (float64, 1e-10).

Claims:

* A and B restricted to a structure are those of the oracle, restricted; expand and reduce, grouped and transposed convolutions, embeddings;
* FOOF: output="identity" is W -> G (A + l I)^-1; every layer of `input_second_moment` alike;
* SKFAC: rows are no approximation: C and every step equal those of the dense factors; more rows than columns are cut, and C stays;
* Eva: the rank-one matrix of the mean rows, (g g^T (x) a a^T + l I)^-1 in closed form; one example is K-FAC itself, several are not; it is
  exceeded by K-FAC's factor; what sends several columns back is refused;
* a history averages the means, not their outer products; rows average in no history but a window;
* mini-blocks: exact sub-blocks of C, and not those by row; 1 x 1 kernels are the diagonal.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_blocks
import dense_cells
import dense_kron
import precond
from dense_cells import ALL
from nets import Case, labels, normal, seeded
from precond.damping import Factored, PerFactor, Tikhonov
from precond.representations import KronIO, Unit
from training import batches, make, matrix_of, net, plain, sgd

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def case(name: str, build: Any, inputs: Tensor, classes: int = 3) -> Case:
    return Case(name, lambda: seeded(build), nn.CrossEntropyLoss(), inputs, labels(classes, len(inputs)))


GROUPED = case(
    "grouped", lambda: nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), normal(4, 4, 3, 3)
)
TRANSPOSED = case(
    "transposed",
    lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)),
    normal(4, 2, 2, 2),
)
CASES = {"mlp": ALL["mlp"], "conv": ALL["conv"], "grouped": GROUPED, "transposed": TRANSPOSED}


def curve(case: Case, matrix: str, repr: Any, **options: Any) -> Any:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=11, **options)


def factors(case: Case, matrix: str, layer: str, sharing: str) -> list[tuple[Tensor, Tensor]]:
    """(B, A) of every group by the oracle, those of a layer."""
    sent = dense_cells.cotangents(case, matrix)
    found = getattr(dense_kron, f"kron_{sharing}")(case.make(), case.criterion, case.inputs, case.targets, sent, layer)
    return found if isinstance(found, list) else [found]


def kronecker_layers(case: Case) -> list[str]:
    return [n for n, m in case.make().named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]


def pieces(n: int, longest: int) -> list[int]:
    count = -(-n // longest)
    return [n // count + (1 if i < n % count else 0) for i in range(count)]


def product(case: Case, layer: str, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    first = getattr(case.make().get_submodule(layer), "transposed", False)
    return torch.block_diag(*(torch.kron(*((A, B) if first else (B, A))) for B, A in pairs))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("input", "output"),
    [("diagonal", "dense"), ("dense", "diagonal"), ("identity", "dense"), ("dense", "identity"), ("diagonal", "diagonal")],
)
@pytest.mark.parametrize("name", CASES)
def test_a_restricted_factor_is_that_of_the_oracle(name: str, input: Any, output: Any, sharing: Any) -> None:
    C = curve(CASES[name], "ggn", KronIO(sharing=sharing, input=input, output=output))
    for layer in kronecker_layers(CASES[name]):
        pairs = factors(CASES[name], "ggn", layer, sharing)
        wanted = [(dense_kron.restricted(B, output, []), dense_kron.restricted(A, input, [])) for B, A in pairs]
        block, expected = C.blocks[layer if layer in C.blocks else f"{layer}.weight"], product(CASES[name], layer, wanted)
        close(block.to_dense(), expected)
        assert (expected - product(CASES[name], layer, pairs)).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize(("input", "output"), [("block", "dense"), ("dense", "block"), ("block", "block")])
def test_blocks_are_as_equal_as_they_can_be(input: Any, output: Any) -> None:
    C = curve(ALL["conv"], "ggn", KronIO(input=input, output=output, block_size=3))
    for layer, ((B, A), *more) in ((layer, factors(ALL["conv"], "ggn", layer, "expand")) for layer in kronecker_layers(ALL["conv"])):
        if more:  # groups fall back
            continue
        close(
            C.blocks[layer].to_dense(),
            torch.kron(*(dense_kron.restricted(F, how, pieces(len(F), 3)) for F, how in ((B, output), (A, input)))),
        )
    block = C.blocks["7"]
    for solver in ("cholesky", "lu", "eigen", "smw"):
        P = precond.inverse(block, solver=solver, damping=0.1)
        close(P @ normal(block.n), torch.linalg.solve(P.damped.to_dense(), normal(block.n)))


def test_groups_have_no_blocks_and_fall_back() -> None:
    assert curve(GROUPED, "ggn", KronIO(input="block")).blocks["0.weight"].kind == "Diagonal"
    with pytest.raises(precond.InvalidCombination, match="which has no further blocks"):
        curve(GROUPED, "ggn", KronIO(input="block"), strict=True)


@pytest.mark.parametrize("input", ["dense", "diagonal", "block", "rows"])
def test_one_hot_inputs_have_a_diagonal_factor(input: Any) -> None:
    embedder = ALL["embedder"]
    pair = dense_cells.embedding_pair(embedder, "0", dense_cells.cotangents(embedder, "ggn"))
    close(curve(embedder, "ggn", KronIO(input=input)).blocks["0"].to_dense(), torch.kron(*pair))
    mean = torch.kron(dense_kron.rank_one(pair[0].diagonal().unsqueeze(0), 1.0), pair[1])
    close(curve(embedder, "ggn", KronIO(input="rank_one")).blocks["0"].to_dense(), mean)


# --- FOOF


@pytest.mark.parametrize("matrix", ["input_second_moment", "ggn"])
def test_foof_is_a_solve_with_the_inputs_alone(matrix: str) -> None:
    mlp, foof = ALL["mlp"], KronIO(output="identity")
    C = curve(mlp, matrix, foof)
    P = precond.inverse(C.blocks["0"], solver="cholesky", damping=Factored(0.09, pi=False))
    x = torch.cat([mlp.inputs, torch.ones(len(mlp.inputs), 1, dtype=mlp.inputs.dtype)], 1)
    A, G = dense_kron._mean_outer(x), normal(5, 5)
    close((P @ G.flatten()).view(5, 5), torch.linalg.solve(A + 0.3 * torch.eye(5).double(), G.T).T / 1.3)
    close(
        precond.inverse(C.blocks["0"], solver="eigen", damping=0.3) @ G.flatten(),
        torch.linalg.solve(A + 0.3 * torch.eye(5).double(), G.T).T.flatten(),
    )
    close(curve(mlp, "input_second_moment", foof).to_dense(), curve(mlp, "input_second_moment", "kron_io").to_dense())
    assert "B" not in foof.over("columns").statistics(precond.partition.Partition(mlp.make()).blocks(["0"], "matrix")[0])


# --- SKFAC


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_no_approximation(name: str, sharing: Any) -> None:
    rows, full = (curve(CASES[name], "empirical_fisher", KronIO(sharing=sharing, **o)) for o in ({"input": "rows", "output": "rows"}, {}))
    close(rows.to_dense(), full.to_dense())
    held = [b for b in rows.blocks.values() if b.kind == "Kronecker"]
    assert all(F.kind == "LowRank" and F.rank <= F.size for C in held for F in C.factors)
    assert name == "mlp" or any(F.rank < F.size for C in held for F in C.factors)  # six examples of five inputs are cut
    v = normal(full.n)
    for damping in (Factored(0.1), Factored(0.1, pi=False), PerFactor(0.1)):
        for ours, theirs in zip(rows.blocks.values(), full.blocks.values(), strict=True):
            if ours.kind == "Kronecker":
                part = v[: ours.n]
                close(
                    precond.inverse(ours, solver="smw", damping=damping) @ part,
                    precond.inverse(theirs, solver="cholesky", damping=damping) @ part,
                )
                close(
                    precond.inverse(ours, solver="eigen", damping=0.1) @ part, precond.inverse(theirs, solver="eigen", damping=0.1) @ part
                )


def test_skfac_trains_as_kfac_does() -> None:
    paths = []
    for repr, solver in (
        (KronIO(input="rows", output="rows"), "smw"),
        (KronIO(), "cholesky"),
        (KronIO(input="rows", output="diagonal"), "smw"),
    ):
        model, criterion = net(), nn.CrossEntropyLoss()
        optimizer = sgd(model)
        with make("empirical_fisher", repr, solver, 0.1).attach(model, criterion, optimizer):
            for x, y in batches(3):
                plain(model, criterion, optimizer, x, y)
        paths.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(paths[0], paths[1])
    assert (paths[0] - paths[2]).norm() > 1e-3


def test_rows_average_in_no_history_but_a_window() -> None:
    with pytest.raises(precond.InvalidCombination, match="keeps rows"):
        make("empirical_fisher", KronIO(input="rows"), "smw", 0.1, history=0.9)
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer, seen = sgd(model, lr=0.0), batches(2)
    with make("empirical_fisher", KronIO(input="rows"), "smw", 0.1, history=precond.history.Window(2)).attach(
        model, criterion, optimizer
    ) as preconditioner:
        for x, y in seen:
            plain(model, criterion, optimizer, x, y)
        C = preconditioner.operators["0"]
    x = torch.cat([a for a, _ in seen])
    A = dense_kron._mean_outer(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1))
    ours = C.factors[1].to_dense()
    close(ours / ours.trace(), A / A.trace())


# --- Eva


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_eva_is_the_matrix_of_the_mean_rows(reduction: Any) -> None:
    criterion, mlp = nn.CrossEntropyLoss(reduction=reduction), ALL["mlp"]
    eva = Case("eva", mlp.make, criterion, mlp.inputs, mlp.targets)
    C, kfac = curve(eva, "empirical_fisher", KronIO(input="rank_one", output="rank_one")), curve(eva, "empirical_fisher", "kron_io")
    sent, weight = dense_cells.cotangents(eva, "empirical_fisher"), 1.0 if reduction == "mean" else float(len(mlp.inputs))
    for layer, block in C.blocks.items():
        ((a, g),) = dense_kron.capture(eva.make(), eva.inputs, sent, layer)
        A, B = dense_kron.rank_one(a.flatten(0, 1), 1.0), dense_kron.rank_one(g.flatten(0, 2), weight)
        close(block.to_dense(), torch.kron(B, A))
        gbar, abar, G, lam = g.flatten(0, 2).mean(0), a.flatten(0, 1).mean(0), normal(B.shape[0], A.shape[0]), 0.03
        inner = (gbar @ G @ abar) * weight / (lam + weight * abar.square().sum() * gbar.square().sum())
        closed = (G - inner * torch.outer(gbar, abar)) / lam
        for solver in ("smw", "eigen"):
            close(precond.inverse(block, solver=solver, damping=Tikhonov(lam)) @ G.flatten(), closed.flatten())
        both = factors(eva, "empirical_fisher", layer, "expand")[0]
        for dense_one, thin in zip(both, (B, A), strict=True):
            assert torch.linalg.eigvalsh(dense_one - thin).min() > -1e-12
        assert (kfac.blocks[layer].to_dense() - block.to_dense()).norm() > 1e-3
    one = Case("one", mlp.make, criterion, mlp.inputs[:1], mlp.targets[:1])
    close(
        curve(one, "empirical_fisher", KronIO(input="rank_one", output="rank_one")).to_dense(),
        curve(one, "empirical_fisher", "kron_io").to_dense(),
    )


@pytest.mark.parametrize("name", ["conv", "grouped", "transposed"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_mean_rows_of_shared_positions(name: str, sharing: Any) -> None:
    each = CASES[name]
    C = curve(each, "empirical_fisher", KronIO(sharing=sharing, input="rank_one", output="rank_one"))
    mixed = curve(each, "empirical_fisher", KronIO(sharing=sharing, input="rank_one", output="diagonal"))
    sent = dense_cells.cotangents(each, "empirical_fisher")
    for layer in kronecker_layers(each):
        wanted, half = [], []
        for (a, g), (B, _) in zip(
            dense_kron.capture(each.make(), each.inputs, sent, layer), factors(each, "empirical_fisher", layer, sharing), strict=True
        ):
            a, g = (a.mean(1), g.sum(2).flatten(0, 1)) if sharing == "reduce" else (a.flatten(0, 1), g.flatten(0, 2))
            A, positions = dense_kron.rank_one(a, 1.0), len(g) / len(each.inputs)
            wanted.append((dense_kron.rank_one(g, positions), A))
            half.append((B.diagonal().diag(), A))
        block = layer if layer in C.blocks else f"{layer}.weight"
        close(C.blocks[block].to_dense(), product(each, layer, wanted))
        close(mixed.blocks[block].to_dense(), product(each, layer, half))


def test_a_history_averages_the_means() -> None:
    model, criterion, seen = net(), nn.CrossEntropyLoss(), batches(2)
    optimizer = sgd(model, lr=0.0)
    preconditioner = make("empirical_fisher", KronIO(input="rank_one", output="rank_one"), "smw", 0.1, history=precond.history.Mean())
    with preconditioner.attach(model, criterion, optimizer):
        for x, y in seen:
            plain(model, criterion, optimizer, x, y)
    both = Case("both", net, criterion, torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen]))
    close(
        matrix_of(preconditioner, "0"), curve(both, "empirical_fisher", KronIO(input="rank_one", output="rank_one")).blocks["0"].to_dense()
    )


def test_several_columns_have_no_one_mean() -> None:
    with pytest.raises(precond.ObservationError, match="sends several columns back"):
        curve(ALL["mlp"], "ggn", KronIO(output="rank_one"))
    with pytest.raises(precond.ObservationError, match="use output='identity'"):
        curve(ALL["mlp"], "input_second_moment", KronIO(output="rank_one"))


@pytest.mark.parametrize(("options", "message"), [({"input": "thin"}, "choose one of 'dense'"), ({"block_size": 0}, "a length, 1 or more")])
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KronIO(**options)
    with pytest.raises(ValueError, match="choose 'row' or 'kernel'"):
        Unit(block="column")  # type: ignore[arg-type]


def test_structured_factors_have_no_pairs() -> None:
    with pytest.raises(precond.InvalidCombination, match=r"is built from columns .* gives only pairs of a step"):
        make("bfgs_hessian", KronIO(input="diagonal"), "bfgs", 0.1)


# --- mini-blocks


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "batched_empirical_fisher", "gradient_covariance", "hessian"])
@pytest.mark.parametrize("name", ["mlp", "conv", "grouped", "transposed", "mha"])
def test_mini_blocks_are_sub_blocks(name: str, matrix: str) -> None:
    each = {**CASES, "mha": ALL["mha"]}[name]
    if name in ("grouped", "transposed"):
        dense_cells.EVERY.setdefault(each.name, each)
    F = dense_cells.held(each, matrix)
    want, by_row = dense_blocks.project_kernel(F, each.make()), dense.project_unit(F, each.make())
    close(curve(each, matrix, Unit(block="kernel")).to_dense(), want)
    assert (want - by_row).norm() > 1e-6 * F.norm()


def test_small_kernels_are_the_diagonal_and_rows_of_a_matrix_have_no_bias() -> None:
    ones = case("ones", lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), normal(4, 3, 2, 2))
    kernels, rows = (curve(ones, "ggn", Unit(block=b)) for b in ("kernel", "row"))
    close(kernels.blocks["0.weight"].to_dense(), kernels.blocks["0.weight"].diagonal().diag())
    close(kernels.blocks["3.weight"].matrix, rows.blocks["3"].matrix[:, :16, :16])
    assert rows.blocks["3"].size == 17
    model = nn.Conv2d(3, 16, 3)
    assert "48 kernels of 9" in str(make(repr=Unit(block="kernel")).attach(model, nn.MSELoss(), sgd(model)).describe())
