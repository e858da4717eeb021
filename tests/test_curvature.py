"""Claims about `precond.curvature`: matrix x representation, with no training. Exact to 1e-10 against the dense oracle.

- The grid walks the registries: for every cell that has a meaning and every net, `to_dense()` is the projection of the oracle's matrix;
  `fisher_mc` is given the labels that it drew. Sharing by reduction and the trace form of `kron_dim` are cells too. A member of a registry
  without an oracle fails a test.
- `kron_dim`: the k-th power of each positive semi-definite block is the Kronecker product of the k factors, which fixes it.
- A cell without meaning is refused with the reason and a nearest choice that is itself accepted; all others are accepted.
- Rule 8: with BatchNorm in training mode blocks are those of the columns of one pass over the batch, products are exact, and the two
  differ; exact=True refuses it by name.
- What falls back in `kron_io` says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import pytest
import torch
from torch import Tensor

import dense
import dense_cells
import precond
from dense_cells import ALL
from nets import normal
from pairs import LEFT, PAIRS, SAMPLED, TRAJECTORY, exactly, grid
from precond import matrices, representations
from precond.matrices import BatchedFisherMC, FisherMC
from precond.partition import Partition
from precond.planning import make_plan
from precond.representations import KronDim, KronIO
from precond.triple import Triple

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

GRID = grid(ALL, PAIRS)


def curve(case: Any, matrix: Any, repr: Any, **options: Any) -> Any:
    model = case.make()
    matrix = exactly(matrix, repr, model)
    return precond.curvature(model, case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, seed=11, rows=case.rows, **options)


class Spy:
    """Records what the matrices of drawn labels sent back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Tensor] = []
        for kind in (FisherMC, BatchedFisherMC):
            monkeypatch.setattr(kind, "cotangents", self.recorded(kind.cotangents))

    def recorded(self, original: Any) -> Any:
        def cotangents(matrix: Any, context: Any) -> Tensor:
            self.sent.append(original(matrix, context))
            return self.sent[-1]

        return cotangents

    def only(self) -> Tensor | None:
        """The one draw; None where nothing was drawn."""
        assert len(self.sent) <= 1
        return self.sent[0] if self.sent else None


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    yield Spy(monkeypatch)


def test_every_member_has_an_oracle() -> None:
    assert set(matrices.names()) == {*dense_cells.MATRICES, *TRAJECTORY}
    assert set(representations.names()) == {*dense_cells.REPRESENTATIONS, "kron_dim"}


NEED = "is built from .*but matrix {matrix!r} gives only"
BY_ROWS = [f"{scope}_{form}" for scope in ("full", "layer", "unit") for form in ("low_rank", "gram")]
REFUSED = {
    **dict.fromkeys([("input_second_moment", r) for r in BY_ROWS], NEED),
    **dict.fromkeys([(m, r) for m in ("hessian", "abs_hessian") for r in BY_ROWS if r not in ("full_low_rank", "layer_low_rank")], NEED),
    **dict.fromkeys([(m, r) for m in ("hessian", "abs_hessian") for r in ("kron_io", "kron_dim")], NEED),
    **dict.fromkeys([(m, r) for m in ("batched_empirical_fisher", "batched_fisher_mc") for r in ("kron_io", "kron_eigen")], NEED),
    **dict.fromkeys([(m, "kron_eigen") for m in ("hessian", "abs_hessian", "input_second_moment")], NEED),
    **dict.fromkeys(
        [("gradient_covariance", r) for r in ("kron_io", "kron_dim")],
        "has no form from which the outer product of a mean can be taken, as {matrix!r} needs",
    ),
    **dict.fromkeys([("input_second_moment", r) for r in ("diagonal", "diagonal_sparse", "kron_dim", "matrix_free")], NEED),
    **dict.fromkeys([(m, f"{scope}_sparse") for m in ("hessian", "abs_hessian", "input_second_moment") for scope in ("full", "layer")], NEED),
    **dict.fromkeys([("ggn_recursive", r) for r in representations.names() if r not in ("full", "layer", "unit", "kron_io")], NEED),
}


def test_cells_without_a_meaning_are_those_whose_needs_the_matrix_does_not_meet() -> None:
    refused = {(m, r) for m in dense_cells.MATRICES for r in representations.names()} - set(PAIRS)
    assert refused == set(REFUSED)


def live(matrix: str, repr: str) -> bool:
    """Products of |H| are taken by a Lanczos process each: too many for a dense matrix of every net."""
    return (matrix, repr) == ("abs_hessian", "matrix_free")


@pytest.mark.parametrize("name", ALL)
def test_products_of_the_absolute_hessian_are_those_of_the_dense_one(name: str) -> None:
    """One process of P steps a product: what is left is the rounding of the products with H, also where H has no full rank."""
    got, want = curve(ALL[name], "abs_hessian", "matrix_free"), dense_cells.whole(ALL[name], "abs_hessian")
    assert want.abs().max() > 1e-4
    for seed in range(3):
        v = normal(len(want), seed=seed)
        close(got @ v, want @ v)


@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize(("name", "matrix", "repr"), [cell for cell in GRID if cell.values[2] != "kron_dim" and not live(*cell.values[1:])])
def test_curvature_is_the_projection_of_the_dense_matrix(name: str, matrix: str, repr: str, spy: Spy) -> None:
    got = curve(ALL[name], matrix, repr).to_dense()
    sampled = spy.only()
    assert (sampled is not None) == (matrix in SAMPLED)
    want = dense_cells.REPRESENTATIONS[repr](ALL[name], matrix, sampled)
    assert want.abs().max() > 1e-4
    close(got, want)


@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize(("name", "matrix", "repr"), [cell for cell in GRID if cell.values[2] == "kron_io"])
def test_kron_io_by_reduction(name: str, matrix: str, repr: str, spy: Spy) -> None:
    got = curve(ALL[name], matrix, KronIO(sharing="reduce")).to_dense()
    close(got, dense_cells.kron_io(ALL[name], matrix, spy.only(), sharing="reduce"))


@pytest.mark.parametrize("normalisation", ["geometric", "trace"])
@pytest.mark.parametrize(("name", "matrix", "repr"), [cell for cell in GRID if cell.values[2] == "kron_dim"])
def test_kron_dim_is_the_product_of_the_factors(name: str, matrix: str, repr: str, normalisation: Any, spy: Spy) -> None:
    case = ALL[name]
    got = curve(case, matrix, KronDim(normalisation=normalisation))
    places, M = dense.positions(case.make()), got.to_dense()
    close(dense.project_tensor(M, case.make()), M)
    for parameter, factors in dense_cells.kron_dim_factors(case, matrix, spy.only()).items():
        block, product, k = M[places[parameter], places[parameter]], reduce(torch.kron, factors), len(factors)
        if normalisation == "trace":
            close(block, product / torch.trace(factors[0]) ** (k - 1) if product.any() else product)
        else:
            assert torch.linalg.eigvalsh((block + block.T) / 2).min() > -1e-10
            close(torch.linalg.matrix_power(block, k), product)


def test_sharing_and_normalisation_are_not_the_same_thing(spy: Spy) -> None:
    conv = ALL["conv"]
    assert (curve(conv, "ggn", KronIO(sharing="reduce")).to_dense() - curve(conv, "ggn", "kron_io").to_dense()).norm() > 1e-2
    assert (curve(conv, "ggn", KronDim(normalisation="trace")).to_dense() - curve(conv, "ggn", "kron_dim").to_dense()).norm() > 1e-2


VALID = [{"matrix": c.matrix, "repr": c.repr, "solver": c.solver} for c in precond.combinations() if c.valid]


@pytest.mark.parametrize("cell", precond.combinations(), ids=lambda c: f"{c.matrix}-{c.repr}-{c.solver}")
def test_a_cell_is_accepted_or_refused_with_the_reason_and_a_valid_choice(cell: precond.Cell) -> None:
    axes = {"matrix": cell.matrix, "repr": cell.repr, "solver": cell.solver}
    if cell.valid:
        assert cell.reason is None
        precond.Preconditioner(**axes)
        return
    assert cell.reason
    with pytest.raises(precond.InvalidCombination, match=re.escape(cell.reason)) as caught:
        precond.Preconditioner(**axes)
    nearest = re.search(r"nearest valid choice is matrix='(\w+)', repr='(\w+)', solver='(\w+)'", str(caught.value))
    assert nearest is not None
    near = dict(zip(axes, nearest.groups(), strict=True))
    changed, members = (
        sum(near[axis] != axes[axis] for axis in axes),
        {"matrix": matrices, "repr": representations, "solver": precond.solvers},
    )
    alone = any({**axes, axis: name} in VALID for axis, registry in members.items() for name in registry.names())
    assert changed == (1 if alone else 2), "no more is changed than must be"
    precond.Preconditioner(**near)


@pytest.mark.parametrize(("matrix", "repr"), REFUSED)
def test_curvature_refuses_a_cell_without_meaning(matrix: str, repr: str) -> None:
    with pytest.raises(precond.InvalidCombination, match=f"{repr!r} {REFUSED[matrix, repr].format(matrix=matrix)}.*nearest valid choice"):
        curve(ALL["mlp"], matrix, repr)


def test_columns_of_one_pass_differ_from_the_exact_matrix_where_examples_mix() -> None:
    case = ALL["bn_train"]
    exact = dense.ggn(case.make(), case.criterion, case.inputs, case.targets)
    assert (curve(case, "ggn", "full").to_dense() - exact).norm() > 0.1 * exact.norm()
    close(curve(case, "ggn", "matrix_free").to_dense(), exact)


@pytest.mark.parametrize("repr", representations.names())
def test_exact_refuses_batch_statistics_by_name(repr: str) -> None:
    with pytest.raises(precond.ObservationError, match=r"exact=True, but '1' normalises by the batch.*model.eval"):
        curve(ALL["bn_train"], "ggn", repr, exact=True)
    model = ALL["bn_train"].make().eval()
    precond.curvature(
        model, ALL["bn_train"].criterion, ALL["bn_train"].inputs, ALL["bn_train"].targets, matrix="ggn", repr=repr, exact=True
    )


def test_exact_refuses_batchnorm_without_running_statistics_in_eval_mode_too() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4, track_running_stats=False)).double().eval()
    with pytest.raises(precond.ObservationError, match="'0' normalises by the batch"):
        precond.curvature(model, ALL["mlp"].criterion, ALL["mlp"].inputs, ALL["mlp"].targets, matrix="ggn", repr="full", exact=True)


@pytest.mark.parametrize("name", ALL)
def test_layers_that_fall_back_are_those_without_factors_and_say_why(name: str) -> None:
    model = ALL[name].make()
    triple = Triple(matrices.get("ggn")(), KronIO(), precond.solvers.get("cholesky")(), 1e-3)
    noted: dict[str, tuple[str, str]] = {}
    for plan in make_plan(Partition(model), triple, None, False).blocks:
        for parameter in plan.block.names:
            if plan.note is not None:
                noted[parameter] = (plan.repr.name, plan.note)
    want = {
        p: instead for layer, names in dense.layer_groups(model) for p in names if (instead := dense_cells.fallback(model, layer, names))
    }
    assert {parameter: repr for parameter, (repr, _) in noted.items()} == want
    tied = "its weight is tied between layers of different kinds"
    for parameter, (_, note) in noted.items():
        assert note.startswith("fallback from kron_io: ") and (tied if parameter == "embedding.weight" else "no Kronecker factors") in note


@pytest.mark.parametrize("name", ["transformer", "bn_train", "lstm"])
def test_strict_refuses_the_fallback(name: str) -> None:
    with pytest.raises(precond.InvalidCombination, match=r"'kron_io' cannot host layer .*strict=False"):
        curve(ALL[name], "ggn", "kron_io", strict=True)
