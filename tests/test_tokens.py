"""Claims about sequences (methods A.1, A.5), in float64 to 1e-10, on a causal attention block where positions mix and embeddings are tied.

- A criterion on (B T, C), on (B, C, T) and on the (B, T, C) that a user rearranges either way is one criterion: every matrix is the
  oracle's, for a mean, a sum, ignored tokens, class weights and an unreduced loss with a mask, observed in training or by
  `precond.curvature`.
- The number of terms is that of the tokens that count, and it divides matrices; not that of the examples, nor of all tokens. An
  example of the empirical Fisher is a sequence: the square of the sum of its tokens, which is not the sum of their squares.
- The expectation of sampled labels over all joint labellings of all tokens is the Fisher matrix.
- Kronecker factors: A is a mean over rows, ignored ones too; B divides by the terms; reduction averages a and sums g over positions.
- A class sent back from all positions at once is not exact where positions mix, and is exact where they do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import precond
from nets import CASES, Case, Transformer, labels, normal, seeded
from precond.likelihoods import Categorical
from precond.representations import KronIO
from training import EXACT, make, solve

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

V, T, B = 3, 3, 2
TOKENS, NEXT = labels(V, B, T, seed=3), torch.tensor([[0, 2, 1], [1, -100, -100]])
W, W7 = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64), normal(7, seed=3).abs()
Layout = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Sequence(Transformer):
    """(B, T) tokens to (B, T, V) logits, as language models have them."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).transpose(1, 2)


def build() -> nn.Module:
    return seeded(lambda: Sequence(V, 2))


def middle() -> nn.Module:
    return seeded(lambda: Transformer(V, 2))


LAYOUTS: dict[str, Layout] = {
    "flattened": lambda f, y: (f.flatten(0, 1), y.flatten()),
    "viewed": lambda f, y: (f.reshape(-1, V), y.reshape(-1)),
    "classes second": lambda f, y: (f.transpose(1, 2), y),
    "classes second, copied": lambda f, y: (f.permute(0, 2, 1).contiguous(), y),
}
CRITERIA = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=W, label_smoothing=0.1),
}
MATRICES = ["ggn", "fisher", "hessian", "empirical_fisher"]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_criterion = pytest.mark.parametrize("criterion", CRITERIA)


def case(criterion: str) -> Case:
    return Case(f"tokens-{criterion}", middle, CRITERIA[criterion], TOKENS, NEXT)


def oracle(matrix: str, criterion: nn.Module) -> Tensor:
    return getattr(dense, matrix)(middle(), criterion, TOKENS, NEXT)


def trained(preconditioner: precond.Preconditioner, criterion: nn.Module, layout: str, masked: bool = False) -> nn.Module:
    """One backward pass and step; the gradients are then the directions."""
    model = build()
    preconditioner.attach(model, criterion)
    f, y = LAYOUTS[layout](model(TOKENS), NEXT)
    if masked:
        kept = y != -100
        ((criterion(f, y.clamp(min=0)) * kept).sum() / kept.sum()).backward()
    else:
        criterion(f, y).backward()
    preconditioner.step()
    return model


@each_layout
@each_criterion
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_layout_is_the_oracles_matrix_in_training(matrix: str, criterion: str, layout: str) -> None:
    preconditioner = make(matrix, "full", "lu", 2.0)
    trained(preconditioner, CRITERIA[criterion], layout)
    torch.testing.assert_close(preconditioner.operators["model"].to_dense(), oracle(matrix, CRITERIA[criterion]), **EXACT)


@each_layout
@each_criterion
@pytest.mark.parametrize("matrix", MATRICES)
def test_products_have_every_layout_too(matrix: str, criterion: str, layout: str) -> None:
    damping = 100.0 if matrix == "hessian" else 0.5  # the Hessian of the sum has an eigenvalue of -76
    solver = precond.solvers.CG(tolerance=1e-13, max_iterations=400)
    model = trained(make(matrix, "matrix_free", solver, damping), CRITERIA[criterion], layout)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    want = solve(oracle(matrix, CRITERIA[criterion]), damping, dense.gradient(middle(), CRITERIA[criterion], TOKENS, NEXT))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)  # an iterative solution


@each_layout
@pytest.mark.parametrize("matrix", MATRICES)
def test_a_mask_over_unreduced_tokens_is_ignored_tokens(matrix: str, layout: str) -> None:
    preconditioner = make(matrix, "full", "lu", 2.0)
    trained(preconditioner, nn.CrossEntropyLoss(reduction="none"), layout, masked=True)
    torch.testing.assert_close(preconditioner.operators["model"].to_dense(), oracle(matrix, nn.CrossEntropyLoss()), **EXACT)


@pytest.mark.parametrize("repr", ["full", "layer", "matrix_free"])
@each_criterion
@pytest.mark.parametrize("matrix", [*MATRICES, "batched_empirical_fisher"])
def test_curvature_is_the_oracles(matrix: str, criterion: str, repr: str) -> None:
    if (matrix, repr) == ("batched_empirical_fisher", "matrix_free"):
        repr = "full"
    want = oracle(matrix, CRITERIA[criterion])
    want = dense.project_layer(want, middle()) if repr == "layer" else want
    flat = seeded(lambda: Transformer(V, 2, flat=True))
    for model, y in ((middle(), NEXT), (flat, NEXT.flatten())):
        close(precond.curvature(model, CRITERIA[criterion], TOKENS, y, matrix=matrix, repr=repr).to_dense(), want)


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_tokens_that_count_divide_and_nothing_else(matrix: str) -> None:
    """Four of six tokens, of two sequences."""
    counted = int((NEXT != -100).sum())
    mean, total = (precond.curvature(middle(), CRITERIA[r], TOKENS, NEXT, matrix=matrix, repr="full").to_dense() for r in ("mean", "sum"))
    close(total, counted * mean)
    for wrong in (B, B * T):
        assert counted != wrong and (total - wrong * mean).norm() > 0.1 * total.norm()


def test_an_example_of_the_empirical_fisher_is_a_sequence() -> None:
    got = precond.curvature(middle(), CRITERIA["sum"], TOKENS, NEXT, matrix="empirical_fisher", repr="full").to_dense()
    U = dense.per_example_gradients(middle(), CRITERIA["sum"], TOKENS, NEXT)
    close(got, U.T @ U)
    one = [torch.where(torch.arange(B * T).view(B, T) == i, NEXT, -100) for i in range(B * T)]
    rows = torch.stack([dense.gradient(middle(), CRITERIA["sum"], TOKENS, y) for y in one])
    close(rows.view(B, T, -1).sum(1), U)
    assert (rows.T @ rows - got).norm() > 0.05 * got.norm()


def test_the_expectation_over_all_joint_labellings_is_the_fisher_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of two tokens over two words, of which one is ignored: 16 labellings."""
    x, y = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1, 0], [0, -100]])

    def model() -> nn.Module:
        return seeded(lambda: Transformer(2, 2))

    criterion, log_p = nn.CrossEntropyLoss(), dense.predict(model(), x).log_softmax(1)
    expectation, total = torch.zeros_like(dense.fisher(model(), criterion, x, y)), 0.0
    for bits in itertools.product((0, 1), repeat=4):
        drawn = torch.tensor(bits).view(2, 2)
        probability = log_p.gather(1, drawn.unsqueeze(1)).sum().exp()
        monkeypatch.setattr(
            Categorical, "sample", lambda self, f, t, g, d=drawn: self.gradient(f, torch.where(t == self.ignore_index, t, d))
        )
        expectation += probability * precond.curvature(model(), criterion, x, y, matrix="fisher_mc", repr="full").to_dense()
        total += float(probability)
    assert abs(total - 1) < 1e-12
    close(expectation, dense.fisher(model(), criterion, x, y))


@each_layout
@each_criterion
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_kronecker_factors_of_every_layout_are_the_oracles(
    matrix: str, sharing: str, criterion: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dense_cells.EVERY, f"tokens-{criterion}", case(criterion))
    preconditioner = make(matrix, KronIO(sharing=sharing), damping=1e-2)
    trained(preconditioner, CRITERIA[criterion], layout)
    M, model = dense_cells.kron_io(case(criterion), matrix, sharing=sharing), middle()
    for layer in ("q", "mlp.0", "out"):
        where = dense.joint_indices(model, layer)
        torch.testing.assert_close(preconditioner.operators[layer].to_dense(), M[where][:, where], **EXACT)


def test_a_counts_every_row_and_b_divides_by_the_terms() -> None:
    """By hand, at the first layer of the MLP: (1 / B T) sum a a^T, and (1 / counted) sum of the squares of all exact columns."""
    model, case_, seen = middle(), case("mean"), []
    model.mlp[0].register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    with dense.forward(model, TOKENS) as output:
        sent = dense.exact_cotangents(case_.criterion, output, NEXT, B)
        g = torch.stack([torch.autograd.grad(output, seen[1], column, retain_graph=True)[0] for column in sent])
    a = torch.cat([seen[0].detach(), torch.ones(B, T, 1, dtype=torch.float64)], -1)
    for sharing in ("expand", "reduce"):
        C = precond.curvature(middle(), case_.criterion, TOKENS, NEXT, matrix="ggn", repr=KronIO(sharing=sharing))
        factor_b, factor_a = (f.to_dense() for f in C.blocks["mlp.0"].factors)
        rows, columns = (a.flatten(0, 1), g.flatten(0, 2)) if sharing == "expand" else (a.mean(1), g.sum(2).flatten(0, 1))
        close(factor_a, rows.T @ rows / len(rows))
        close(factor_b, columns.T @ columns / 4)


def at_all_positions(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a factor gives whose column of a class is sent back from every position at once."""
    criterion = nn.CrossEntropyLoss()
    columns = dense.exact_cotangents(criterion, dense.predict(model, x), y, len(x))
    merged = columns.view(T, V, *columns.shape[1:]).sum(0)
    U = dense.column_gradients(model, criterion, x, merged).flatten(0, 1)
    return U.T @ U / (B * T)


def test_a_class_at_all_positions_at_once_is_not_exact_where_a_parameter_is_shared() -> None:
    y = labels(V, B, T, seed=8)
    exact = dense.ggn(middle(), nn.CrossEntropyLoss(), TOKENS, y)
    assert (at_all_positions(middle(), TOKENS, y) - exact).norm() > 0.05 * exact.norm()
    close(precond.curvature(middle(), nn.CrossEntropyLoss(), TOKENS, y, matrix="ggn", repr="full").to_dense(), exact)


class Apart(nn.Module):
    """Every position has a Linear of its own, and so no parameter sees two."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(2, V) for _ in range(T))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, t]) for t, layer in enumerate(self.each)], -1)


def test_it_is_exact_by_layer_where_positions_share_nothing() -> None:
    model, x, y = seeded(Apart), normal(B, T, 2), labels(V, B, T, seed=8)
    close(dense.project_layer(at_all_positions(model, x, y), model), dense.ggn(model, nn.CrossEntropyLoss(), x, y))


@pytest.mark.parametrize("name", ["transformer", "transformer_flat", "transformer_ignore"])
@pytest.mark.parametrize("options", [{"weight": W7}, {"label_smoothing": 0.2}, {"weight": W7, "label_smoothing": 0.2}])
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "fisher"])
def test_options_on_the_larger_networks(matrix: str, options: dict, name: str) -> None:
    net, criterion = CASES[name], nn.CrossEntropyLoss(**options)
    got = precond.curvature(net.make(), criterion, net.inputs, net.targets, matrix=matrix, repr="layer").to_dense()
    want = getattr(dense, matrix)(net.make(), criterion, net.inputs, net.targets)
    close(got, dense.project_layer(want, net.make()))
