"""Claims about the data of `precond.curvature` (identities 8, 9, 32), exact to 1e-10.

- `batches=` of unequal sizes, a last partial one included, in any order, gives the matrix of them together for a mean loss, and the sum for
  a sum: what adds, adds, and what is squared (the gradient) is squared after the sum. Without the weights it is another matrix.
- The weight is the number of terms, not of examples, where targets are ignored.
- A tuple and a dict of inputs are the model's arguments.
- No batches, a batch without examples, both ways of giving data or neither, and an output that is no tensor are refused by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import precond
from nets import CASES, Case, labels, normal, seeded
from pairs import LEFT, OF_A_BATCH, PAIRS, SAMPLED, entries, exactly, hosts
from precond import matrices, representations

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

pytestmark = pytest.mark.filterwarnings(LEFT)
PARTS = (slice(0, 1), slice(1, 4), slice(4, 6))


def split(case: Case, order: tuple[int, ...] = (0, 1, 2)) -> list[tuple[Tensor, Tensor]]:
    return [(case.inputs[PARTS[i]], case.targets[PARTS[i]]) for i in order]


def curve(case: Case, matrix: Any, repr: Any, **data: Any) -> Tensor:
    data = data or {"inputs": case.inputs, "targets": case.targets}
    model = case.make()
    C = precond.curvature(model, case.criterion, matrix=exactly(matrix, repr, model), repr=repr, seed=1, **data)
    return entries(C, matrix, repr)


@pytest.mark.parametrize(
    ("name", "matrix", "repr"),
    [(name, m, r) for name in ("mlp", "mse_sum", "bce", "reused") for m, r in PAIRS if m not in SAMPLED and hosts(name, m)],
)
def test_batches_of_unequal_sizes_are_one_batch(name: str, matrix: str, repr: str) -> None:
    """Kronecker factors add too: A is a mean over rows, B a sum over them, each weighted by its part."""
    case = CASES[name]
    want = curve(case, matrix, repr)
    close(curve(case, matrix, repr, batches=split(case)), want)
    close(curve(case, matrix, repr, batches=iter(split(case, (2, 0, 1)))), want)


@pytest.mark.parametrize("matrix", [m for m in OF_A_BATCH if m not in SAMPLED])
def test_the_mean_of_the_parts_without_their_weights_is_another_matrix(matrix: str) -> None:
    case = CASES["mlp"]
    parts = [curve(case, matrix, "full", inputs=x, targets=y) for x, y in split(case)]
    want = curve(case, matrix, "full")
    assert (sum(parts) / 3 - want).norm() > 1e-3 * want.norm()
    weighted = sum(part * len(y) / 6 for part, (_, y) in zip(parts, split(case), strict=True))
    if matrix in (
        "batched_empirical_fisher",
        "abs_hessian",
        "gradient_covariance",
        "ggn_recursive",
    ):  # squares, absolute values, squares of means and products of averages do not add
        assert (weighted - want).norm() > 1e-3 * want.norm()
    else:
        close(weighted, want)


@pytest.mark.parametrize("repr", ["full", "matrix_free"])
def test_every_batch_draws_its_own_labels(repr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, sent = CASES["mlp"], []
    original = matrices.FisherMC.cotangents
    monkeypatch.setattr(matrices.FisherMC, "cotangents", lambda self, context: sent.append(original(self, context)) or sent[-1])
    got = curve(case, "fisher_mc", repr, batches=[(case.inputs, case.targets)] * 2)
    first, second = sent
    assert not torch.equal(first, second)
    close(got, (dense_cells.whole(case, "fisher_mc", first) + dense_cells.whole(case, "fisher_mc", second)) / 2)


@pytest.mark.parametrize(
    ("matrix", "repr"),
    [(m, r) for m, r in PAIRS if m not in SAMPLED and hosts("transformer_ignore", m) and r in ("layer", "kron_io", "kron_dim")],
)
def test_batches_weigh_by_terms_where_targets_are_ignored(matrix: str, repr: str) -> None:
    case = CASES["transformer_ignore"]
    batches = [(case.inputs[i : i + 1], case.targets[i : i + 1]) for i in range(3)]
    counts = [int((y != -100).sum()) for _, y in batches]
    assert len(set(counts)) == 3
    close(curve(case, matrix, repr, batches=batches), curve(case, matrix, repr))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["conv", "embedder"])
def test_kronecker_factors_of_shared_positions_add(name: str, sharing: Any, reduction: str) -> None:
    plain = dense_cells.ALL[name]
    case = Case(name, plain.make, nn.CrossEntropyLoss(reduction=reduction), plain.inputs, plain.targets)
    batches = [(case.inputs[part], case.targets[part]) for part in (slice(0, 1), slice(1, 4))]
    repr = representations.KronIO(sharing=sharing)
    close(curve(case, "ggn", repr, batches=batches), curve(case, "ggn", repr))


@pytest.mark.parametrize("matrix", OF_A_BATCH)
def test_a_sum_is_terms_times_a_mean(matrix: str) -> None:
    """Identity 8: a sum of cross-entropies is N times the mean, N S for sequences; N^2 for the squared gradient."""
    for case in (CASES[name] for name in ("mlp", "transformer_ignore") if hosts(name, matrix)):
        name = case.name
        terms = dense.terms(case.criterion, dense.predict(case.make(), case.inputs), case.targets)
        total = Case(name, case.make, nn.CrossEntropyLoss(reduction="sum"), case.inputs, case.targets)
        factor = {"batched_empirical_fisher": terms**2, "input_second_moment": 1}.get(matrix, terms)
        close(curve(total, matrix, "layer"), factor * curve(case, matrix, "layer"))


@pytest.mark.parametrize("matrix", OF_A_BATCH)
@pytest.mark.parametrize("name", ["mse", "bce"])
def test_a_sum_over_outputs_is_terms_times_outputs_times_a_mean(name: str, matrix: str) -> None:
    """Identity 8: N K, where torch's mean is over N rows and K outputs; (N K)^2 and, per term, N K^2 for squares of true gradients; inputs know no loss."""
    case = CASES[name]
    total = Case(name, case.make, type(case.criterion)(reduction="sum"), case.inputs, case.targets)
    N, K = case.targets.shape
    factors = {"batched_empirical_fisher": (N * K) ** 2, "input_second_moment": 1}
    factor = factors.get(matrix, N * K**2 if matrix in ("empirical_fisher", "gradient_covariance") else N * K)
    close(curve(total, matrix, "layer"), factor * curve(case, matrix, "layer"))
    assert factor != N


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.first(x) if y is None else self.first(x) + self.second(y).tanh()


@pytest.mark.parametrize("repr", representations.names())
def test_tuples_and_dicts_are_the_models_arguments(repr: str) -> None:
    model, criterion, x, y, target = seeded(Two), nn.CrossEntropyLoss(), normal(5, 4), normal(5, 2), labels(3, 5)
    found = [
        precond.curvature(model, criterion, inputs, target, matrix="ggn", repr=repr).to_dense()
        for inputs in ((x, y), {"x": x, "y": y}, {"y": y, "x": x})
    ]
    close(found[0], found[1])
    close(found[0], found[2])
    if repr == "full":
        close(found[0], dense.ggn(model, criterion, (x, y), target))
        alone = precond.curvature(model, criterion, x, target, matrix="ggn", repr=repr).to_dense()
        close(alone, dense.ggn(model, criterion, x, target))
        assert not alone[15:].any() and found[0][15:].any()


@pytest.mark.parametrize(("matrix", "repr"), PAIRS)
def test_no_data_is_refused(matrix: str, repr: str) -> None:
    case = CASES["mlp"]
    with pytest.raises(precond.UsageError, match="batches= is empty"):
        curve(case, matrix, repr, batches=[])
    none = (case.inputs[:0], case.targets[:0])
    for batches in ([none], [(case.inputs, case.targets), none]):
        with pytest.raises(precond.UsageError, match="holds no examples"):
            curve(case, matrix, repr, batches=batches)


def test_data_are_given_one_way() -> None:
    case = CASES["mlp"]
    for data in ({"batches": split(case), "inputs": case.inputs, "targets": case.targets}, {"inputs": None}):
        with pytest.raises(precond.UsageError, match=r"inputs and targets, or batches=.*one of the two"):
            curve(case, "ggn", "full", **data)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(precond.ObservationError, match=r"returns a tuple.*wrap the model"):
        precond.curvature(nn.LSTM(3, 2).double(), nn.CrossEntropyLoss(), normal(4, 2, 3), labels(2, 4, 2), matrix="ggn", repr="full")


def test_targets_without_inputs_and_a_frozen_model_are_refused() -> None:
    model = seeded(lambda: nn.Linear(4, 3)).requires_grad_(False)
    with pytest.raises(precond.UsageError, match="no trainable parameters"):
        precond.curvature(model, nn.CrossEntropyLoss(), normal(5, 4), labels(3, 5), matrix="ggn", repr="full")
