"""Claims against curvlinops 3.0.1, in float64 to 1e-10; it sees each batch in two unequal parts.

- GGN and Hessian are its, dense and by products. So is the empirical Fisher matrix, up to its constant: it multiplies the gradient of a
  mean over K outputs by sqrt(K), so that its matrix is K times ours for MSELoss and BCEWithLogitsLoss by mean; and it takes a token
  of a sequence for an example.
- K-FAC, expand and reduce, of Linear and Conv2d, from the exact loss-Hessian, the true gradient and inputs alone, is its.
- So is EK-FAC. Eigenvectors of an input factor's null space are anybody's, and the exact second moments there are not zero if the factor
  is that of the reduction: so a convolution has more examples than its patches have entries.
- Reduction with a loss at each position is ours alone: it sends a class back from all positions at once, which is not exact.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_kron
import precond
from nets import Case, labels, normal, seeded
from oracles.peers import NETS, close, curvlinops
from precond.representations import KronEigen, KronIO

OPERATORS = {
    "ggn": curvlinops.GGNLinearOperator,
    "hessian": curvlinops.HessianLinearOperator,
    "empirical_fisher": curvlinops.EFLinearOperator,
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
FISHER = {"ggn": "type-2", "empirical_fisher": "empirical", "input_second_moment": "forward-only"}


class Tokens(nn.Module):
    """(N, T, 3) to (N, 3, T) logits, each position on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh()).movedim(-1, 1)


TOKENS = Case("tokens", lambda: seeded(Tokens), nn.CrossEntropyLoss(), normal(4, 5, 3), labels(3, 4, 5))
ALL = {**NETS, TOKENS.name: TOKENS}


def theirs(operator: Callable, case: Case, **options: object) -> Tensor:
    model, x, y = case.make(), case.inputs, case.targets
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    C = operator(model, case.criterion, list(model.parameters()), parts, check_deterministic=False, **options)
    return C @ torch.eye(C.shape[1], dtype=torch.float64)


def ours(case: Case, matrix: object, repr: object = "full") -> precond.operators.Operator:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr)


def constant(case: Case, matrix: str) -> float:
    """Their empirical Fisher matrix over ours."""
    elementwise = isinstance(case.criterion, nn.MSELoss | nn.BCEWithLogitsLoss) and case.criterion.reduction == "mean"
    return float(case.targets.shape[-1]) if matrix == "empirical_fisher" and elementwise else 1.0


@pytest.mark.parametrize("name", [name for name in ALL if name != "tokens"])
@pytest.mark.parametrize("matrix", OPERATORS)
def test_matrices_and_their_products(matrix: str, name: str) -> None:
    case, want = ALL[name], theirs(OPERATORS[matrix], ALL[name])
    v = normal(len(want), seed=9)
    close(constant(case, matrix) * ours(case, matrix).to_dense(), want)
    close(constant(case, matrix) * (ours(case, matrix, "matrix_free") @ v), want @ v)


def test_of_a_sequence_the_examples_of_the_empirical_fisher_are_its_tokens_there() -> None:
    close(ours(TOKENS, "ggn").to_dense(), theirs(OPERATORS["ggn"], TOKENS))
    close(ours(TOKENS, "hessian").to_dense(), theirs(OPERATORS["hessian"], TOKENS))
    each = Case("each", TOKENS.make, TOKENS.criterion, TOKENS.inputs.reshape(20, 1, 3), TOKENS.targets.reshape(20, 1))
    want = theirs(OPERATORS["empirical_fisher"], TOKENS)
    close(ours(each, "empirical_fisher").to_dense(), want)
    assert (ours(TOKENS, "empirical_fisher").to_dense() - want).norm() > 0.1 * want.norm()


MANY = Case("many", NETS["conv-mean"].make, nn.CrossEntropyLoss(), normal(30, 2, 6, 6), labels(3, 30))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "case", [MANY, *(NETS[f"{net}-{how}"] for net in ("mlp", "mse", "bce") for how in ("mean", "sum"))], ids=lambda case: case.name
)
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_ekfac(matrix: str, case: Case, sharing: str) -> None:
    options = {"fisher_type": FISHER[matrix], "kfac_approx": sharing, "separate_weight_and_bias": False}
    want = theirs(curvlinops.EKFACLinearOperator, case, **options)
    close(constant(case, matrix) * ours(case, matrix, KronEigen(sharing=sharing)).to_dense(), want)
    assert (want - theirs(curvlinops.KFACLinearOperator, case, **options)).norm() > 1e-4 * want.norm()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("matrix", FISHER)
def test_kfac(matrix: str, name: str, sharing: str) -> None:
    case = ALL[name]
    want = theirs(curvlinops.KFACLinearOperator, case, fisher_type=FISHER[matrix], kfac_approx=sharing, separate_weight_and_bias=False)
    got = constant(case, matrix) * ours(case, matrix, KronIO(sharing=sharing)).to_dense()
    if (matrix, name, sharing) != ("ggn", "tokens", "reduce"):
        close(got, want)
        return
    model, x, y = case.make(), case.inputs, case.targets
    exact = dense.exact_cotangents(case.criterion, dense.predict(model, x), y, 4)
    merged = exact.view(5, 3, *exact.shape[1:]).sum(0)
    for layer in ("inner", "outer"):
        place = dense.joint_indices(model, layer)
        for sent, M in ((exact, got), (merged, want)):
            B, A = dense_kron.kron_reduce(model, case.criterion, x, y, sent, layer)
            close(torch.kron(B, A), M[place][:, place])
    assert (got - want).norm() > 0.1 * got.norm()
