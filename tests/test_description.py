"""What `describe()` says of how a tensor is held: whatever is left out of C, or put in another shape, is said, and nothing else is.

- Structured factors, cut eigenvalues, sketches, patterns, kernels, tiles, merged and squeezed dimensions.
- The plain forms of every representation say nothing, beside a default that is an approximation by itself (a pattern).
- Bytes: what is shown is what the tensors of a block hold, at its first parameter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nets import labels, normal, seeded
from precond import representations
from precond.representations import FullLowRank, FullSparse, KronDim, KronEigen, KronIO, LayerLowRank, LayerSparse, Unit, UnitLowRank
from precond.solvers import Riemannian
from training import make, plain, sgd

CE = nn.CrossEntropyLoss()


def conv() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)))


SAID: list[tuple[Any, str]] = [
    (KronIO(input="diagonal"), "input factor diagonal"),
    (KronIO(output="identity"), "output factor the identity"),
    (KronIO(input="block", output="block", block_size=4), "input factor in blocks of at most 4, output factor in blocks of at most 4"),
    (KronIO(input="rows", output="rows"), "input factor by its rows, output factor by its rows"),
    (KronIO(output="rank_one"), "output factor of rank one"),
    (FullLowRank(rank=3), "cut to rank 3"),
    (FullLowRank(rank=3, gather=5), "cut to rank 3 to 8"),
    (LayerLowRank(energy=0.9, tolerance=0.01), "cut to 0.9 of the trace, values above 0.01 of the largest"),
    (UnitLowRank(rank=2), "cut to rank 2"),
    (FullLowRank(rank=3, method="sketch"), "sketch of 13 directions, cut to rank 3"),
    (FullLowRank(rank=3, method="lanczos"), "eigenpairs from at most 26 products, cut to rank 3"),
    (LayerLowRank(sketch=7), "Gram matrix estimated from at most 7 coordinates"),
    (LayerSparse(), "precision on the pattern 'bias'"),
    (FullSparse(form="masked", pattern="band", width=2), "masked on the pattern 'band' of width 2"),
    (Unit(block="kernel"), "24 kernels of 4"),
    (KronDim(max_dim=3), "6 x 4 x 2 x 2 in 4 tiles of 3 x 2 x 2 x 2"),
    (KronDim(merge_dims="kernel"), "(6, 4, 2, 2) as 6 x 4 x 4"),
    (KronEigen(basis_of="dim", merge_dims="rest"), "(6, 4, 2, 2) as 6 x 16"),
    (KronDim(modes=(0,), merge_dims="rest"), "(6, 4, 2, 2) as 6 x 16, the factor of dimension 1 (16) identity"),
]


@pytest.mark.parametrize(("repr", "note"), SAID, ids=[str(i) for i in range(len(SAID))])
def test_what_is_left_out_or_reshaped_is_said(repr: Any, note: str) -> None:
    preconditioner = make("empirical_fisher", repr, "cg").attach(model := conv(), CE, sgd(model))
    assert {row.parameter: row.note for row in preconditioner.describe().rows}["0.weight"] == note


def test_squeezed_dimensions_are_said() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(6, 3)))
    preconditioner = make("empirical_fisher", KronDim(squeeze=True), "cg").attach(model, CE, sgd(model))
    notes = {row.parameter: row.note for row in preconditioner.describe().rows}
    assert notes["0.weight"] == "(6, 4, 1, 1) as 6 x 4" and notes["2.weight"] == ""


@pytest.mark.parametrize(
    ("group", "note"),
    [
        ("dense", ""),
        ("lower", "roots of the inverse factors lower triangular"),
        (("block", "dense"), "roots of the inverse factors in blocks of 4, dense"),
    ],
)
def test_the_structure_in_which_a_solver_holds_its_factors_is_said(group: Any, note: str) -> None:
    solver = Riemannian(group=group, block=4)
    preconditioner = make("empirical_fisher", "kron_io", solver).attach(model := conv(), CE, sgd(model))
    assert {row.parameter: row.note for row in preconditioner.describe().rows}["0.weight"] == note


@pytest.mark.parametrize("name", representations.names())
def test_a_plain_form_says_nothing(name: str) -> None:
    matrix = "ggn" if name == "matrix_free" else "empirical_fisher"
    preconditioner = make(matrix, name, "cg").attach(model := conv(), CE, sgd(model))
    notes = {row.note for row in preconditioner.describe().rows}
    assert notes == ({"precision on the pattern 'bias'"} if name in ("full_sparse", "layer_sparse") else {""})


@pytest.mark.parametrize("repr", ["full", "layer", "kron_io", "unit", "diagonal", "layer_gram"])
def test_bytes_are_those_of_the_tensors_held(repr: str) -> None:
    preconditioner = make("empirical_fisher", repr, "cg").attach(model := conv(), CE, optimizer := sgd(model))
    before = {row.parameter: row.bytes for row in preconditioner.describe().rows}
    assert set(before.values()) == {0}
    plain(model, CE, optimizer, normal(5, 4, 2, 2), labels(3, 5))
    rows = preconditioner.describe().rows

    def count(tree: Any) -> int:
        if isinstance(tree, torch.Tensor):
            return tree.numel() * tree.element_size()
        return sum(count(t) for t in (tree.values() if isinstance(tree, dict) else tree)) if isinstance(tree, dict | list | tuple) else 0

    held = [count((block["statistics"], block["state"])) for block in preconditioner.state_dict()["blocks"].values()]
    assert sum(row.bytes for row in rows) == sum(held) > 0
    assert [row.bytes for row in rows if row.bytes] == held
    assert str(held[0]) in str(preconditioner.describe())


def test_a_layer_left_out_says_why_and_a_fallback_says_from_what() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    preconditioner = make("ggn", "kron_io", "cholesky", overrides={"2": None}).attach(model, CE, sgd(model))
    notes = {row.parameter: (row.triple, row.note) for row in preconditioner.describe().rows}
    assert notes["2.weight"][0] == "-" and "left by an override" in notes["2.weight"][1]
    assert notes["1.weight"][0].split(" x ")[1] == "unit" and "Kronecker" in notes["1.weight"][1]
    assert notes["0.weight"][1] == ""
