"""Claims about the sparse representations `full_sparse`, `layer_sparse`, `diagonal_sparse` and the solver `sparse_cholesky`. To 1e-10.

- Masked: the entries of the oracle on the pattern and zeros elsewhere, for every preset, a mask and pairs of the user's own, from columns,
  gradients and products; the pattern leaves something out.
- Precision: the network of the oracle's matrix on the graph. A complete graph gives F itself, an empty one its diagonal, a tree F where the
  true precision has the tree and not where it has another; any numbering will do. "unit" is the representation `unit`.
- What is averaged are entries: over batches the network of the mean, not the mean of the networks.
- `sparse_cholesky` applies the inverse of the network of F + damping I, which is not that of the network plus damping; cg does masked ones.
- A parent that is constant tells nothing and gives no NaN.
- Patterns without meaning, of a wrong size, and cells without meaning are refused by one sentence.
- `diagonal_sparse`: the diagonal where a mask, or a nonzero weight, says so; a step elsewhere is that of the damping alone.
- Neither form makes anything of P x P numbers.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dense
import dense_cells
import dense_sparse
import precond
from nets import CASES, normal, seeded
from precond.damping import Blockwise, Tikhonov
from precond.representations import DiagonalSparse, FullSparse, LayerSparse
from precond.solvers import CG

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
PRESETS = [("bias", 1), ("unit", 1), ("band", 1), ("band", 4), ("diagonal", 1)]


def curve(case: str, matrix: str, repr: Any, **options: Any) -> Any:
    made = CASES[case]
    return precond.curvature(
        made.make(), made.criterion, made.inputs, made.targets, matrix=matrix, repr=repr, seed=11, rows=made.rows, **options
    )


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def definite(n: int, seed: int = 0) -> Tensor:
    A = normal(n, n, seed=seed)
    return A @ A.T + 0.5 * eye(n)


def regression(F: Tensor) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Weights without a bias whose GGN is F: that of least squares on its Cholesky factor is 2 X^T X / N."""
    X = torch.linalg.cholesky(F).T * (len(F) / 2) ** 0.5
    return nn.Linear(len(F), 1, bias=False).double(), nn.MSELoss(), X, torch.zeros(len(F), 1, dtype=torch.float64)


def of(F: Tensor, repr: Any) -> Any:
    return precond.curvature(*regression(F), matrix="ggn", repr=repr)


MASKED = [
    (case, matrix) for case in ("mlp", "conv", "transformer") for matrix in ("ggn", "gradient_covariance", "batched_empirical_fisher")
]


@pytest.mark.parametrize(("case", "matrix"), [*MASKED, ("mlp", "hessian")])
def test_masked_entries_are_those_of_the_whole_matrix(case: str, matrix: str) -> None:
    model = CASES[case].make()
    whole = dense_cells.held(CASES[case], matrix)
    for pattern, width in PRESETS:
        mask = dense_sparse.mask(dense_sparse.parents(model, pattern, width))
        assert (whole * ~mask).abs().max() > 1e-3
        got = curve(case, matrix, FullSparse(form="masked", pattern=pattern, width=width))
        close(got.to_dense(), whole * mask)
        assert got.blocks["model"].kind == "Sparse"
        by_layer = curve(case, matrix, LayerSparse(form="masked", pattern=pattern, width=width))
        close(by_layer.to_dense(), dense.project_layer(whole * mask, model))


@pytest.mark.parametrize("matrix", ["ggn", "batched_empirical_fisher"])
@pytest.mark.parametrize("case", ["mlp", "conv", "transformer"])
def test_the_precision_form_is_the_network_of_the_whole_matrix_on_the_graph(case: str, matrix: str) -> None:
    model = CASES[case].make()
    F = dense_cells.held(CASES[case], matrix) + 0.1 * eye(sum(p.numel() for p in model.parameters()))
    for pattern, width in PRESETS:
        graph = dense_sparse.parents(model, pattern, width)
        want = dense_sparse.network(F, graph)
        (block,) = curve(case, matrix, FullSparse(pattern=pattern, width=width)).blocks.values()
        close(block.plus(0.1).to_dense(), want)
        assert ((want - F).abs().max() > 1e-3) and (pattern == "diagonal") == (not want.tril(-1).any())


def test_masks_and_pairs_of_ones_own() -> None:
    F = definite(5)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = mask | mask.T
    close(of(F, FullSparse(form="masked", pattern=mask)).to_dense(), F * (mask | eye(5).bool()))  # the diagonal is always there
    pairs = torch.tensor([[0, 4, 1, 3, 2], [4, 0, 3, 3, 0]])  # in either order, twice, and on the diagonal
    kept = eye(5).bool()
    kept[[0, 4, 1, 3, 2, 0], [4, 0, 3, 1, 0, 2]] = True
    close(of(F, LayerSparse(form="masked", pattern=pairs)).to_dense(), F * kept)


def test_a_complete_graph_is_exact_and_an_empty_one_the_diagonal() -> None:
    F, order = definite(6), [3, 0, 5, 1, 4, 2]
    complete: list[list[int]] = [[] for _ in order]
    for place, i in enumerate(order):
        complete[i] = order[:place]
    for graph in (complete, [list(range(i)) for i in range(6)]):
        close(of(F, FullSparse(pattern=graph)).to_dense(), F)
        P = precond.inverse(of(F, FullSparse(pattern=graph)), solver="sparse_cholesky", damping=0.2)
        close(P.to_dense(), torch.linalg.inv(F + 0.2 * eye(6)))
    close(of(F, FullSparse(pattern="band", width=9)).to_dense(), F)
    for none in ("diagonal", [[]] * 6, torch.full((6, 2), -1)):
        close(of(F, FullSparse(pattern=none)).to_dense(), F.diagonal().diag())


def test_a_tree_is_exact_where_the_true_precision_has_it() -> None:
    tree = [[1], [4], [1], [4], []]
    F = dense_sparse.network(definite(5), tree)
    precision = torch.linalg.inv(F)
    close(precision * ~dense_sparse.mask(tree), torch.zeros(5, 5, dtype=torch.float64))
    assert F.abs().min() > 1e-3, "no entry of the matrix itself is zero"
    close(of(F, FullSparse(pattern=tree)).to_dense(), F)
    rerooted = [[], [0], [1], [4], [1]]  # the same tree with its arrows from another root
    close(of(F, FullSparse(pattern=torch.tensor([[*pa, -1][:1] for pa in rerooted]))).to_dense(), F)
    with pytest.raises(AssertionError):
        close(of(F, FullSparse(pattern=[[1], [4], [3], [4], []])).to_dense(), F)


@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_the_unit_graph_is_the_unit_representation(case: str) -> None:
    dampened: dict[str, Any] = {"damping": 0.1}
    units = precond.inverse(curve(case, "ggn", "unit"), solver="cholesky", **dampened)
    close(
        precond.inverse(curve(case, "ggn", LayerSparse(pattern="unit")), solver="sparse_cholesky", **dampened).to_dense(), units.to_dense()
    )
    bias = precond.inverse(curve(case, "ggn", LayerSparse(pattern="bias")), solver="sparse_cholesky", **dampened)
    assert (bias.to_dense() - units.to_dense()).abs().max() > 1e-2


def test_entries_are_averaged_and_the_network_is_made_of_the_average() -> None:
    case, repr = CASES["mlp"], LayerSparse()
    parts = [slice(0, 2), slice(2, 6)]
    batches = [(case.inputs[part], case.targets[part]) for part in parts]
    whole = curve("mlp", "empirical_fisher", repr)
    model = case.make()
    together = precond.curvature(model, case.criterion, batches=batches, matrix="empirical_fisher", repr=repr)
    close(together.to_dense(), whole.to_dense())
    alone = [precond.curvature(model, case.criterion, x, t, matrix="empirical_fisher", repr=repr).to_dense() for x, t in batches]
    assert ((2 * alone[0] + 4 * alone[1]) / 6 - whole.to_dense()).abs().max() > 1e-3
    masked = LayerSparse(form="masked")
    close(
        precond.curvature(model, case.criterion, batches=batches, matrix="ggn", repr=masked).to_dense(),
        curve("mlp", "ggn", masked).to_dense(),
    )


def test_sparse_cholesky_inverts_the_network_of_the_damped_matrix() -> None:
    F, tree = definite(5), [[1], [4], [1], [4], []]
    C = of(F, FullSparse(pattern=tree))
    P = precond.inverse(C, solver="sparse_cholesky", damping=0.3)
    want = dense_sparse.network(F + 0.3 * eye(5), tree)
    close(P.to_dense(), torch.linalg.inv(want))
    close(P.damped.to_dense(), want)
    close(P.logdet(), -torch.logdet(want))
    inverse_pattern = torch.linalg.inv(want).abs() > 1e-9
    assert torch.equal(inverse_pattern, dense_sparse.mask(tree)), "the inverse is sparse on a tree"
    assert (want - dense_sparse.network(F, tree) - 0.3 * eye(5)).abs().max() > 1e-3
    with pytest.raises(precond.InvalidCombination, match="use Blockwise damping"):
        precond.inverse(C, solver="sparse_cholesky", damping=Tikhonov(0.3))
    with pytest.raises(precond.InvalidCombination, match="applies the power -1 only"):
        precond.inverse(C, solver="sparse_cholesky", damping=0.3, power=0.5)
    with pytest.raises(precond.InvalidCombination, match="for a LowRank operator use Tikhonov"):
        Blockwise(0.1)(precond.operators.LowRank(eye(2)))


def test_cg_inverts_a_masked_matrix() -> None:
    C = curve("mlp", "ggn", FullSparse(form="masked", pattern="unit"))
    P = precond.inverse(C, solver=CG(tolerance=1e-14), damping=0.5)
    close(P.to_dense(), torch.linalg.inv(C.to_dense() + 0.5 * eye(C.shape[0])))
    network = curve("mlp", "ggn", "full_sparse")
    both = [precond.inverse(network, solver=solver, damping=0.5).to_dense() for solver in (CG(tolerance=1e-14), "sparse_cholesky")]
    close(both[0], both[1])


def test_a_parent_that_is_constant_tells_nothing() -> None:
    F = definite(4)
    F[0] = F[:, 0] = 0.0
    C = of(F + torch.tensor([1e-40, 0, 0, 0], dtype=torch.float64).diag(), FullSparse(pattern=[[], [0], [0, 1], [0, 1, 2]]))
    close(C.to_dense(), F)
    P = precond.inverse(C, solver="sparse_cholesky", damping=0.1)
    close(P.to_dense(), torch.linalg.inv(F + 0.1 * eye(4)))
    U = normal(2, 4)
    of_rank_two = torch.stack([U.T @ U] * 4)
    order = torch.tensor([[0, -1, -1, -1], [1, 0, -1, -1], [2, 0, 1, -1], [3, 0, 1, 2]])
    own = order.clamp(min=0)
    blocks = of_rank_two[torch.arange(4).view(-1, 1, 1), own.unsqueeze(2), own.unsqueeze(1)]
    singular = precond.operators.SparsePrecision(blocks, order[:, 1:])
    close(singular.to_dense(), U.T @ U)
    with pytest.raises(precond.SolverFailure, match="increase the damping"):
        precond.inverse(singular, solver="sparse_cholesky")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pattern": [[1], [2], [0]]}, "the parents form a cycle, .*: leave out one of its edges"),
        ({"pattern": [[0]]}, "form a cycle, 0 <- 0"),
        ({"pattern": [[], [0, 0]]}, "each parent of a coordinate once"),
        ({"pattern": [[], [2]]}, "a graph of 2 coordinates has parents 0 to 1"),
        ({"pattern": torch.ones(2, 2)}, "takes parents \\(n, k\\) of integers"),
        ({"pattern": torch.ones(2, 2, dtype=torch.bool)}, "takes parents \\(n, k\\) of integers"),
        ({"pattern": "units"}, "choose one of 'bias', 'unit', 'band', 'diagonal'"),
        ({"pattern": "band", "width": 0}, "at least one coordinate"),
        ({"form": "dense"}, "choose one of 'precision', 'masked'"),
        ({"form": "masked", "pattern": [[], [0]]}, "a graph of parents needs form='precision'"),
        ({"form": "masked", "pattern": torch.ones(2, 3, dtype=torch.bool)}, "use mask \\| mask.T"),
        ({"form": "masked", "pattern": torch.ones(3, 3, dtype=torch.bool).tril()}, "use mask \\| mask.T"),
        ({"form": "masked", "pattern": torch.zeros(3, 3, dtype=torch.long)}, "two rows of row and column numbers"),
        ({"form": "masked", "pattern": torch.tensor([[0], [-1]])}, "two rows of row and column numbers"),
    ],
)
def test_patterns_without_meaning_are_refused_when_they_are_made(options: dict[str, Any], says: str) -> None:
    for kind in (FullSparse, LayerSparse):
        with pytest.raises(ValueError, match=says):
            kind(**options)
    if not isinstance(options.get("pattern", ""), str):
        with pytest.raises(ValueError, match=says):
            LayerSparse(**{**options, "pattern": {"0": options["pattern"]}})
        with pytest.raises(ValueError, match="for 'layer_sparse'"):
            FullSparse(**{**options, "pattern": {"0": options["pattern"]}})


@pytest.mark.parametrize(
    "repr",
    [
        FullSparse(pattern=[[], [0]]),
        FullSparse(form="masked", pattern=torch.ones(2, 2, dtype=torch.bool)),
        FullSparse(form="masked", pattern=torch.tensor([[5], [0]])),
        LayerSparse(pattern={"model": [[], [0]]}),
    ],
)
def test_patterns_of_another_size_are_refused_when_they_meet_the_model(repr: Any) -> None:
    with pytest.raises(precond.InvalidCombination, match=r"cannot hold block 'model' of 5 coordinates: .* there are 5: give"):
        of(definite(5), repr)
    model, criterion, *_ = regression(definite(5))
    made = precond.Preconditioner(matrix="ggn", repr=repr, solver="cg")
    with pytest.raises(precond.InvalidCombination, match="there are 5: give"):
        made.attach(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1))


def test_cells_without_meaning_say_why() -> None:
    for form, matrix, solver, says in [
        (
            "precision",
            "hessian",
            "sparse_cholesky",
            "is built from columns .* or the gradient of the step, but matrix 'hessian' gives only products",
        ),
        ("masked", "ggn", "sparse_cholesky", "takes SparsePrecision operators, but representation 'full_sparse' makes a Sparse"),
        ("precision", "ggn", "cholesky", "makes a SparsePrecision"),
        ("masked", "input_second_moment", "cg", "gives only moments of layer inputs"),
    ]:
        with pytest.raises(precond.InvalidCombination, match=says):
            precond.Preconditioner(matrix=matrix, repr=FullSparse(form=form), solver=solver)
    precond.Preconditioner(matrix="hessian", repr=FullSparse(form="masked"), solver="cg")


def test_a_layer_whose_pattern_is_not_given_falls_back_or_is_refused() -> None:
    graph = dense_sparse.parents(CASES["mlp"].make()[0], "bias")
    repr, F = LayerSparse(pattern={"0": graph, "4": "unit"}), dense_cells.whole(CASES["mlp"], "ggn")
    C = curve("mlp", "ggn", repr)
    assert {name: block.kind for name, block in C.blocks.items()} == {
        "0": "SparsePrecision", "2.weight": "Diagonal", "2.bias": "Diagonal", "4": "SparsePrecision"
    }  # fmt: skip
    close(C.diagonal(), F.diagonal())
    with pytest.raises(
        precond.InvalidCombination, match=r"'layer_sparse' cannot host layer '2' .*its patterns name the layers '0', '4' only"
    ):
        curve("mlp", "ggn", repr, strict=True)
    C = precond.inverse(C, solver="sparse_cholesky", damping=0.1)
    close(C.blocks["2.bias"].to_dense(), (C.blocks["2.bias"].damped.diagonal() ** -1).diag())


def test_a_changed_option_is_another_pattern() -> None:
    repr = FullSparse(form="masked", pattern="band")
    first = of(definite(4), repr).to_dense()
    wider = dataclasses.replace(repr, width=2)
    assert wider == FullSparse(form="masked", pattern="band", width=2) != repr
    assert (of(definite(4), wider).to_dense() - first).abs().max() > 1e-3
    close(of(definite(6), repr).to_dense(), definite(6) * dense_sparse.mask([[], *[[i] for i in range(5)]]))  # one object, two models


def pruned() -> nn.Module:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    with torch.no_grad():
        model[0].weight[0, 1:3] = 0.0
        model[0].bias[1] = 0.0
        model[2].weight.zero_()
        model[2].weight[1] = 1.0
    return model


@pytest.mark.parametrize("matrix", ["ggn", "batched_empirical_fisher", "hessian"])
def test_diagonal_sparse_keeps_what_is_not_pruned(matrix: str) -> None:
    model, case = pruned(), CASES["mlp"]
    whole = dense_cells.MATRICES[matrix](model, case.criterion, case.inputs, case.targets).diagonal()
    kept = torch.cat([(p != 0 if p.dim() > 1 else torch.ones_like(p)).flatten().bool() for p in model.parameters()])
    data = (case.criterion, case.inputs, case.targets)
    assert 0 < (~kept).sum() == 8 and (whole * ~kept).abs().max() > 1e-3
    close(precond.curvature(model, *data, matrix=matrix, repr="diagonal_sparse").to_dense(), (whole * kept).diag())
    mask = {"0.weight": torch.tensor([[1, 0, 0, 1]] * 3), "2.bias": torch.tensor([False, True, True])}
    chosen = torch.ones_like(kept)
    chosen[:12], chosen[-3:] = mask["0.weight"].flatten().bool(), mask["2.bias"]
    close(precond.curvature(model, *data, matrix=matrix, repr=DiagonalSparse(mask=mask)).to_dense(), (whole * chosen).diag())
    with torch.no_grad():
        model[2].weight.zero_()  # new, not pruned
    assert precond.curvature(model, *data, matrix=matrix, repr="diagonal_sparse").blocks["2.weight"].diagonal().any()


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(
        precond.InvalidCombination, match=r"the mask of '0.weight' has the shape \(2,\), and the parameter \(5, 4\): give it that"
    ):
        curve("mlp", "ggn", DiagonalSparse(mask={"0.weight": torch.ones(2)}))


def test_a_pruned_weight_has_the_step_of_the_damping_and_its_own_average_once_it_grows() -> None:
    model, case = pruned(), CASES["mlp"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner = precond.Preconditioner(matrix="ggn", repr="diagonal_sparse", solver="elementwise", damping=0.5, history=0.9)
    preconditioner.attach(model, case.criterion, optimizer)

    def step() -> tuple[Tensor, Tensor]:
        """Gradient and direction of the first weight, flat."""
        optimizer.zero_grad()
        case.criterion(model(case.inputs), case.targets).backward()
        gradient = model[0].weight.grad.flatten().clone()
        optimizer.step()
        return gradient, model[0].weight.grad.flatten()

    d = dense.ggn(model, case.criterion, case.inputs, case.targets).diagonal()[:12]
    gradient, direction = step()
    close(direction, gradient / (d * (model[0].weight != 0).flatten() + 0.5))
    with torch.no_grad():
        model[0].weight[0, 1] = 0.3
    grown = dense.ggn(model, case.criterion, case.inputs, case.targets).diagonal()[:12]
    gradient, direction = step()
    average = (0.09 * d + 0.1 * grown) / 0.19
    close(direction, gradient / (average * (model[0].weight != 0).flatten() + 0.5))
    assert direction[2] == gradient[2] / 0.5 and direction[1] != gradient[1] / 0.5


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.seen = max(self.seen, each.untyped_storage().nbytes() // each.element_size())
        return result


@pytest.mark.parametrize("repr", [FullSparse(form="masked"), FullSparse(), FullSparse(pattern="band", width=3)])
def test_nothing_of_p_times_p_numbers_is_made(repr: Any) -> None:
    model = nn.Sequential(nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, 3))
    P, (x, t) = 1283, (torch.randn(5, 60), torch.tensor([0, 1, 2, 0, 1]))
    with Largest() as mode:
        C = precond.curvature(model, nn.CrossEntropyLoss(), x, t, matrix="ggn", repr=repr)
        product = C if repr.form == "masked" else precond.inverse(C, solver="sparse_cholesky", damping=0.1)
        assert (product @ torch.ones(P)).isfinite().all()
    assert P < mode.seen < 60 * P < P**2
