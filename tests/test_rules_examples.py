"""Rules 7 and 8 claim:

- a layer whose leading size is not the batch is refused by name where examples must be told apart, with what to write; `rows="flattened"`
  and `rows="second"` then give the oracle's matrix; unrefused, it would be silently wrong; Kronecker expansion needs no examples;
- BatchNorm in training mode is marked by `describe()`, in eval mode it is not; its columns are those of one backward pass over the batch;
  `curvature(exact=True)` refuses it by name;
- the terms of an output with the batch second are refused for exact columns, which would take them for those of other examples.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nets import CASES, labels, normal, seeded
from precond import ObservationError, curvature
from precond.layers import Rule
from training import EXACT, differ, make, matrix_of, of, plain, sgd

CE = nn.CrossEntropyLoss()


class Flattened(nn.Module):
    """(N, T, 4) tokens, flattened to (N T, 4) for the first layer, as a mixture of experts or a window does it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.flatten(0, 1))).view(*x.shape[:2], -1).mean(1))


class Second(Flattened):
    """The first layer sees (T, N, 4), as with `batch_first=False`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


DATA = normal(6, 3, 4), labels(3, 6)
LAYOUTS = pytest.mark.parametrize(("build", "layout"), [(Flattened, "flattened"), (Second, "second")])
PER_EXAMPLE = pytest.mark.parametrize("repr", ["full", "layer", "unit", "diagonal"])


def observed(build: Any, matrix: str = "ggn", repr: Any = "layer", **options: Any) -> Any:
    model, criterion = seeded(build), nn.CrossEntropyLoss()
    solver = "elementwise" if repr == "diagonal" else "cholesky"
    preconditioner, optimizer = make(matrix, repr, solver, **options), sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    plain(model, criterion, optimizer, *DATA)
    return preconditioner


def inner_block(matrix: str, build: Any) -> Tensor:
    return of(matrix)(seeded(build), *DATA)[:25, :25]


@LAYOUTS
@PER_EXAMPLE
def test_a_layer_whose_rows_are_not_examples_is_refused_by_name(build: Any, layout: str, repr: str) -> None:
    with pytest.raises(ObservationError, match=r"'inner' has \d+ leading rows for a batch of 6 examples.*rows=\{'inner': 'flattened'\}"):
        observed(build, repr=repr)


@LAYOUTS
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_rows_says_the_layout_and_the_matrix_is_exact(build: Any, layout: str, matrix: str) -> None:
    ours = observed(build, matrix, rows={"inn*": layout})
    assert_close(matrix_of(ours, "inner"), inner_block(matrix, build), **EXACT)


def test_rows_taken_for_examples_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rule, "check", lambda rule, seen: None)
    differ(matrix_of(observed(Flattened), "inner"), inner_block("ggn", Flattened))


def test_the_wrong_layout_does_not_pass_the_self_check_or_is_the_wrong_matrix() -> None:
    with pytest.raises((ObservationError, RuntimeError)):
        observed(Second, rows={"inner": "flattened", "head": "second"})


@LAYOUTS
def test_kronecker_expansion_needs_no_examples(build: Any, layout: str) -> None:
    without, said = observed(build, repr="kron_io"), observed(build, repr="kron_io", rows={"inner": layout})
    assert_close(matrix_of(without, "inner"), matrix_of(said, "inner"), **EXACT)


BN = CASES["bn_train"]


def trained(repr: str = "layer", evaluating: bool = False) -> Any:
    model, criterion = BN.make(), nn.CrossEntropyLoss()
    if evaluating:
        model.eval()
    preconditioner, optimizer = make("empirical_fisher", repr), sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    plain(model, criterion, optimizer, BN.inputs, BN.targets)
    return preconditioner, model


@pytest.mark.parametrize("evaluating", [False, True], ids=["train", "eval"])
def test_describe_marks_batch_statistics(evaluating: bool) -> None:
    table = str(trained(evaluating=evaluating)[0].describe())
    marked = [line.split()[0] for line in table.splitlines() if "batch statistics: columns include cross-example terms" in line]
    assert marked == ([] if evaluating else ["1.weight", "1.bias"])


def test_the_columns_of_a_batch_are_those_of_one_backward_pass() -> None:
    """By hand: the columns at the first layer are the gradient of the summed losses, which another example's loss has a share in."""
    preconditioner, _ = trained()
    model, captured = BN.make(), []
    model[0].register_forward_hook(lambda module, args, output: captured.append(output))
    loss = nn.CrossEntropyLoss(reduction="sum")(model(BN.inputs), BN.targets)
    (g,) = torch.autograd.grad(loss, captured)
    rows = torch.cat([torch.einsum("no,ni->noi", g, BN.inputs).flatten(1), g], 1)
    assert_close(matrix_of(preconditioner, "0"), rows.T @ rows / len(g), **EXACT)
    differ(matrix_of(preconditioner, "0"), of("empirical_fisher")(BN.make(), BN.inputs, BN.targets)[:25, :25])


def test_an_exact_curvature_refuses_batch_statistics_by_name() -> None:
    model = BN.make()
    with pytest.raises(ObservationError, match=r"'1' normalises by the batch.*model\.eval\(\)"):
        curvature(model, CE, BN.inputs, BN.targets, matrix="ggn", repr="layer", exact=True)
    model.eval()
    exact = curvature(model, CE, BN.inputs, BN.targets, matrix="ggn", repr="full", exact=True)
    assert_close(exact.to_dense(), of("ggn")(model, BN.inputs, BN.targets), **EXACT)


class Positions(nn.Module):
    """Position embeddings, looked up once and broadcast over the batch."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.positions, self.head, self.index = nn.Embedding(4, 4), nn.Linear(4, 3), index

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.positions(self.index)).mean(1))


@pytest.mark.parametrize("index", [torch.arange(4).unsqueeze(0), torch.arange(4)], ids=["(1, T)", "(T,)"])
def test_a_call_that_all_examples_share_is_refused_by_name_and_right_when_said(index: Tensor) -> None:
    model, x, y = seeded(lambda: Positions(index)), normal(6, 4, 4), labels(3, 6)
    with pytest.raises(ObservationError, match=r"rows=\{'positions': 'shared'\}"):
        curvature(model, CE, x, y, matrix="ggn", repr="kron_io")
    got = curvature(model, CE, x, y, matrix="ggn", repr="kron_io", rows={"positions": "shared"}).to_dense()
    each = seeded(lambda: Positions(torch.arange(4).expand(6, 4)))
    assert_close(got, curvature(each, CE, x, y, matrix="ggn", repr="kron_io").to_dense(), **EXACT)


class Sequence(nn.Module):
    """Positions that mix, and logits (N, T, C), or (T, N, C) with the batch second."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.layer, self.second = nn.Linear(3, 4), second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.tanh(x.cumsum(1)))
        return y.transpose(0, 1) if self.second else y


@pytest.mark.parametrize("time", [4, 6])
@pytest.mark.parametrize("flat", [True, False])
def test_terms_of_an_output_with_the_batch_second_are_refused_where_examples_are_told_apart(time: int, flat: bool) -> None:
    """Exact columns take terms for one example's after another's; drawn labels and the true gradient do not ask."""
    x, y, criterion = normal(3, time, 3), labels(4, 3, time), nn.CrossEntropyLoss()

    def step(matrix: str, repr: str, second: bool) -> Tensor:
        model = seeded(lambda: Sequence(second))
        preconditioner = make(matrix, repr)
        with preconditioner.attach(model, criterion, optimizer := torch.optim.SGD(model.parameters(), lr=0.1)):
            output, target = model(x), y.T if second else y
            loss = criterion(output.flatten(0, 1), target.flatten()) if flat else criterion(output.transpose(1, 2), target)
            loss.backward()
            optimizer.step()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    for matrix in ("ggn", "fisher"):
        with pytest.raises(ObservationError, match=r"the batch is their leading dimension, before the criterion"):
            step(matrix, "full", second=True)
    torch.testing.assert_close(step("empirical_fisher", "layer", True), step("empirical_fisher", "layer", False), rtol=1e-10, atol=1e-10)
    assert step("ggn", "full", second=False).isfinite().all()
    assert step("fisher_mc", "kron_io", second=True).isfinite().all()
