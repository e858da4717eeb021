"""`kron_dim` and `kron_eigen` over dimensions in other shapes than the tensor's: squeezed, merged, in tiles, with factors left out (float64, 1e-10).

Claims:

* every option gives the matrix of the oracle: a product of factors a tile, in both normalisations, from columns and from the gradient;
  the shapes and the tiles themselves are written out by hand, dimensions that no tile divides evenly included;
* one mode alone is one-sided Shampoo, with exponent -1/2: one step without damping is the polar factor; two modes are not;
* tiles are no approximation where there is one, and differ where there are more; a spectrum carried between bases keeps its sum tile by tile;
* solvers see what they see without tiles: every one that takes a Kronecker operator inverts uneven tiles, and a state of them is saved;
* nothing is silent: `describe()` says the shape, the tiles and the factors left out; a tensor without a factor takes the fallback.
"""

from __future__ import annotations

import functools
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import dense
import dense_cells
import dense_eigen
import dense_kron
import precond
from dense_cells import ALL
from nets import labels, normal, seeded
from precond.representations import KronDim, KronEigen
from precond.tiling import Tiling
from training import fit, make, matrix_of, plain, sgd, theta

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
D, E, I = "dense", "diagonal", "identity"  # noqa: E741
# options: of some parameters the shape, the lengths of the pieces, the forms
SHAPES: dict[str, tuple[dict[str, Any], dict[str, tuple[list[int], list[list[int]], list[str]]]]] = {
    "squeezed": ({"squeeze": True}, {"0.weight": ([4, 3, 3], [[4], [3], [3]], [D] * 3), "2.weight": ([4, 4, 2, 2], [[4], [4], [2], [2]], [D] * 4)}),
    "rest": ({"merge_dims": "rest"}, {"0.weight": ([4, 9], [[4], [9]], [D] * 2), "7.weight": ([3, 16], [[3], [16]], [D] * 2)}),
    "matrix": ({"merge_dims": "matrix"}, {"0.weight": ([4, 9], [[4], [9]], [D] * 2), "7.bias": ([3, 1], [[3], [1]], [D] * 2)}),
    "kernel": ({"merge_dims": "kernel"}, {"2.weight": ([4, 4, 4], [[4], [4], [4]], [D] * 3), "7.bias": ([3], [[3]], [D])}),
    "merged_first": ({"merge_dims": "first", "max_dim": 16}, {"2.weight": ([16, 4], [[16], [4]], [D] * 2), "0.weight": ([12, 3], [[12], [3]], [D] * 2)}),
    "merged_last": ({"merge_dims": "last", "max_dim": 9}, {"2.weight": ([4, 4, 4], [[4], [4], [4]], [D] * 3), "0.weight": ([4, 9], [[4], [9]], [D] * 2)}),
    "tiles": ({"merge_dims": "rest", "max_dim": 8}, {"2.weight": ([4, 16], [[4], [8, 8]], [D] * 2), "7.weight": ([3, 16], [[3], [8, 8]], [D] * 2)}),
    "uneven": ({"merge_dims": "rest", "max_dim": 3}, {
        "0.weight": ([4, 9], [[2, 2], [3, 3, 3]], [D] * 2),
        "2.weight": ([4, 16], [[2, 2], [3, 3, 3, 3, 2, 2]], [D] * 2),
        "7.weight": ([3, 16], [[3], [3, 3, 3, 3, 2, 2]], [D] * 2),
        "5.bias": ([4], [[2, 2]], [D]),
    }),
    "identity": ({"merge_dims": "rest", "max_dim": 8, "oversized": "identity"}, {"2.weight": ([4, 16], [[4], [16]], [D, I]), "7.bias": ([3], [[3]], [D])}),
    "one_side": ({"modes": (0,)}, {"2.weight": ([4, 4, 2, 2], [[4], [4], [2], [2]], [D, I, I, I]), "7.weight": ([3, 16], [[3], [16]], [D, I])}),
    "last_side": ({"modes": (-1,), "max_dim": 6}, {"7.weight": ([3, 16], [[3], [6, 5, 5]], [I, D]), "7.bias": ([3], [[3]], [D])}),
    "shortest": ({"modes": "shortest", "merge_dims": "rest"}, {"7.weight": ([3, 16], [[3], [16]], [D, I]), "0.weight": ([4, 9], [[4], [9]], [D, I])}),
}  # fmt: skip
DIAGONAL = {"max_dim": 8, "oversized": "diagonal"}


def curve(case: Any, matrix: str, repr: Any) -> Any:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=11)


def gradients(matrix: str) -> tuple[dict[str, torch.Tensor], float]:
    rows, factor = dense_cells.columns(ALL["conv"], matrix)
    return dense.split(rows, ALL["conv"].make()), factor


@functools.cache
def untouched(matrix: str, normalisation: Any) -> torch.Tensor:
    return curve(ALL["conv"], matrix, KronDim(normalisation=normalisation)).to_dense()


@pytest.mark.parametrize(("matrix", "normalisation"), [("ggn", "trace"), ("ggn", "geometric"), ("batched_empirical_fisher", "geometric")])
@pytest.mark.parametrize("name", [*SHAPES, "diagonal"])
def test_every_option_is_the_matrix_of_the_oracle(name: str, matrix: str, normalisation: Any) -> None:
    options, want = SHAPES.get(name, (DIAGONAL, {"7.weight": ([3, 16], [[3], [16]], [D, E]), "2.bias": ([4], [[4]], [D])}))
    M, before = curve(ALL["conv"], matrix, KronDim(normalisation=normalisation, **options)).to_dense(), untouched(matrix, normalisation)
    parts, factor = gradients(matrix)
    places = dense.positions(ALL["conv"].make())
    for parameter, (shape, pieces, forms) in want.items():
        at = places[parameter]
        expected = dense_kron.kron_dim_tiled(parts[parameter], shape, pieces, forms, trace=normalisation == "trace", scale=factor)
        assert expected.norm() > 1e-4
        close(M[at, at], expected)
    if (name, normalisation) == ("squeezed", "trace"):  # a factor of one number is t, and divides by t
        close(M, before)
    else:
        assert (M - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("matrix", ["ggn", "batched_empirical_fisher", "gradient_covariance"])
@pytest.mark.parametrize("name", ["squeezed", "merged_first", "tiles", "uneven", "identity", "one_side", "last_side"])
def test_the_eigenbasis_has_the_same_shapes(name: str, matrix: str) -> None:
    options, want = SHAPES[name]
    M = curve(ALL["conv"], matrix, KronEigen(basis_of="dim", **{"oversized": "tile", **options})).to_dense()
    parts, factor = gradients(matrix)
    places, F = dense.positions(ALL["conv"].make()), dense_cells.held(ALL["conv"], matrix)
    for parameter, (shape, pieces, forms) in want.items():
        block, flat = F[places[parameter], places[parameter]], parts[parameter].flatten(1)
        expected = torch.zeros_like(block)
        for place in dense_kron.tiles(shape, pieces):
            where = place.flatten()
            factors = dense_kron.kron_dim(flat[:, where].reshape(-1, *place.shape), factor)
            kept = [f if form == D else torch.eye(len(f), dtype=f.dtype) for f, form in zip(factors, forms, strict=True)]
            expected[where.unsqueeze(1), where] = dense_eigen.corrected(kept, block[where][:, where])
        close(M[places[parameter], places[parameter]], expected)


def test_one_tile_is_no_tile_and_two_are_not_one() -> None:
    whole, same, more = (curve(ALL["mlp"], "ggn", KronDim(max_dim=n)).to_dense() for n in (None, 5, 4))
    close(same, whole)
    assert (more - whole).norm() > 1e-2 * whole.norm()


@pytest.mark.parametrize(("shape", "pieces"), [((5, 4), ((3, 2), (2, 2))), ((2, 7, 3), ((2,), (3, 2, 2), (2, 1))), ((6,), ((6,),))])
def test_tiles_are_in_the_order_of_the_oracle_and_come_back(shape: Any, pieces: Any) -> None:
    tiling, n = Tiling(shape, pieces), torch.Size(shape).numel()
    x = normal(2, n)
    arranged = tiling.arrange(x)
    assert torch.equal(tiling.restore(arranged), x)
    tiles = [tile for group in tiling.split(arranged) for tile in group.unbind(1)]
    wanted = [x[:, place.flatten()].reshape(2, *place.shape) for place in dense_kron.tiles(list(shape), [list(p) for p in pieces])]
    assert sorted(tuple(t.flatten().tolist()) for t in tiles) == sorted(tuple(t.flatten().tolist()) for t in wanted)
    assert {t.shape for t in tiles} == {t.shape for t in wanted}


def test_one_side_without_damping_is_the_polar_factor() -> None:
    model, criterion = seeded(lambda: nn.Linear(6, 3, bias=False)), nn.MSELoss()
    x, y = normal(8, 6), normal(8, 3, seed=4)
    G = dense.gradient(model, criterion, x, y).view(3, 6)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    steps = {}
    for name, repr in {"one": KronDim(modes=(0,)), "two": KronDim(), "wrong": KronDim(modes=(0,), normalisation="trace")}.items():
        C = precond.curvature(model, criterion, x, y, matrix="batched_empirical_fisher", repr=repr)
        damping = 1e-13 if name == "two" else 0.0  # the other side has no full rank
        steps[name] = (precond.inverse(C, solver="eigen", damping=damping, power=0.5) @ G.flatten()).view(3, 6)
    close(steps["one"], U @ V)
    torch.testing.assert_close(steps["two"], U @ V, rtol=1e-4, atol=1e-4)
    assert (steps["wrong"] - U @ V).norm() > 0.5


@pytest.mark.parametrize("solver", ["cholesky", "lu", "eigen", "smw", "cg"])
def test_solvers_invert_uneven_tiles(solver: str) -> None:
    C = curve(ALL["mlp"], "ggn", KronDim(max_dim=3, normalisation="trace"))
    block = C.blocks["0.weight"]
    assert block.kind == "BlockDiagonal"
    made = precond.solvers.CG(tolerance=1e-13) if solver == "cg" else solver
    P = precond.inverse(C, solver=made, damping=precond.damping.Tikhonov(0.1) if solver == "cg" else 0.1)
    v = normal(C.n)
    close(P @ v, torch.linalg.solve(P.damped.to_dense(), v))
    state = precond.solvers.create(solver).init(block, precond.damping.Factored(0.1)) if solver == "smw" else None
    if state is not None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=True)
        assert torch.equal(precond.solvers.SMW().apply(again, v[: block.n])[0], precond.solvers.SMW().apply(state, v[: block.n])[0])


@pytest.mark.parametrize(
    "repr", [KronDim(max_dim=3), KronEigen(basis_of="dim", max_dim=3, oversized="tile", basis_interval=2)], ids=["dim", "eigen"]
)
def test_training_with_tiles_equals_the_dense_steps(repr: Any) -> None:
    solver = precond.solvers.Eigen(power=0.5)
    preconditioner = make("batched_empirical_fisher", repr, solver, 0.1, history=0.9)
    model, criterion = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    with preconditioner.attach(model, criterion, optimizer):
        for step in range(3):
            x, y = normal(6, 5, seed=step), labels(3, 6, seed=step)
            before, g = theta(model), dense.gradient(model, criterion, x, y)
            plain(model, criterion, optimizer, x, y)
            C, at = matrix_of(preconditioner, "0.weight"), slice(0, 20)
            d, U = torch.linalg.eigh(C)
            tiles = dense_kron.tiles([4, 5], [[2, 2], [3, 2]])
            moved = torch.cat([tile.flatten() for tile in (tiles[0], tiles[2], tiles[1], tiles[3])])  # those of one shape together
            direction = torch.zeros(20, dtype=d.dtype)
            direction[moved] = (U * (d + 0.1) ** -0.5) @ U.T @ g[at][moved]
            close((before - theta(model))[at], optimizer.param_groups[0]["lr"] * direction)


def test_describe_shows_every_shape_that_is_not_plain() -> None:
    preconditioner = make("batched_empirical_fisher", KronDim(merge_dims="rest", max_dim=8), precond.solvers.Eigen(power=0.5))
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.Flatten(), nn.Linear(6, 3)))
    preconditioner.attach(model, nn.CrossEntropyLoss(), sgd(model))
    said = {row.parameter: row.note for row in preconditioner.describe().rows}
    assert said == {"0.weight": "(6, 4, 2, 2) as 6 x 16 in 2 tiles of 6 x 8", "0.bias": "", "2.weight": "", "2.bias": ""}
    remark = KronDim(max_dim=8, oversized="diagonal", modes=(0, 1)).remark((10, 4, 3))
    assert remark == "the factor of dimension 0 (10) diagonal, the factor of dimension 2 (3) identity"
    assert KronDim(max_dim=400).remark((785, 5)) == "785 x 5 in 1 tile of 393 x 5 and 1 of 392 x 5"


def test_a_tensor_without_a_factor_takes_the_fallback() -> None:
    preconditioner = make("batched_empirical_fisher", KronDim(max_dim=4, oversized="identity"), precond.solvers.Eigen(power=0.5))
    fit(preconditioner, steps=1)  # weights (5, 4), (3, 5), biases 5 and 3
    rows = {row.parameter: row for row in preconditioner.describe().rows}
    assert rows["0.bias"].triple == "batched_empirical_fisher x diagonal x eigen"
    assert "none of its dimensions (5,) has a factor" in rows["0.bias"].note
    assert rows["0.weight"].note == "the factor of dimension 0 (5) identity"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_dims": "all", "max_dim": 4}, r"KronDim\(merge_dims='all'\): choose 'none' or 'first'"),
        ({"merge_dims": "last"}, "while their product is at most max_dim: give one"),
        ({"max_dim": 0}, "it is a length, 1 or more"),
        ({"max_dim": 2.5}, "it is a length, 1 or more"),
        ({"oversized": "drop"}, "choose 'tile' or 'identity' or 'diagonal'"),
        ({"modes": ()}, r"such as \(0,\)"),
        ({"modes": "longest"}, "or 'all' or 'shortest'"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KronDim(**options)


def test_a_list_of_modes_is_what_a_recipe_has() -> None:
    assert KronDim(modes=[0]) == KronDim(modes=(0,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the basis of a diagonal factor is the identity"):
        KronEigen(basis_of="dim", oversized="diagonal")
