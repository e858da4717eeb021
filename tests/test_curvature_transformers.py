"""Claims about `precond.curvature` on GPT-2 and ViT of `transformers`, exact to 1e-10 against the dense oracle.

- Every matrix that has a value from one batch is the oracle's in `full`, `layer`, `matrix_free` and `diagonal`: weights stored (in, out), the
  head tied to the embedding, parameters owned by a module that has children (the class token). In every other representation too, for a
  matrix of each kind.
- A model may return an object or a dict: its `logits`, or its only tensor with a gradient, is what the criterion takes; else it is refused.
- `rows="shared"`: an embedding of positions called once for all examples, on (1, T) or (T,), gives what one row an example gives, for
  matrices of every kind; without it, it is refused for what needs examples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import precond
from nets import SHRUNK, labels, normal, seeded
from pairs import LEFT, PAIRS, SAMPLED, exactly
from test_curvature import Spy

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

ONE_BATCH = [m for m in dense_cells.MATRICES if m not in ("bfgs_hessian", "ggn_recursive")]
EXACT = ("full", "layer", "matrix_free", "diagonal")
KINDS = ("ggn", "empirical_fisher", "batched_empirical_fisher", "input_second_moment", "hessian")
GRID = [(name, m, r) for name in SHRUNK for m, r in PAIRS if m in ONE_BATCH and r in EXACT] + [
    (name, m, r) for name in SHRUNK for m, r in PAIRS if m in KINDS and r in dense_cells.REPRESENTATIONS and r not in EXACT
]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize(("name", "matrix", "repr"), GRID)
def test_curvature_is_the_projection_of_the_dense_matrix(name: str, matrix: str, repr: str, spy: Spy) -> None:
    case, model = SHRUNK[name], SHRUNK[name].make()
    C = precond.curvature(model, case.criterion, case.inputs, case.targets, matrix=exactly(matrix, repr, model), repr=repr, seed=11)
    v = normal(C.shape[0])
    got = C @ v if repr == "matrix_free" else C.to_dense()  # a product costs a pass (for |H| a Lanczos process): one stands for all
    sampled = spy.only()
    assert (sampled is not None) == (matrix in SAMPLED)
    want = dense_cells.REPRESENTATIONS[repr](case, matrix, sampled)
    assert want.abs().max() > 1e-4
    close(got, want @ v if repr == "matrix_free" else want)


def test_gpt2_and_vit_are_those_of_transformers_with_a_tied_head() -> None:
    models = [SHRUNK[name].make().model for name in ("gpt2", "vit")]
    assert [type(m).__module__.split(".")[0] for m in models] == ["transformers"] * 2
    assert models[0].lm_head.weight is models[0].transformer.wte.weight
    assert all(100 < sum(p.numel() for p in m.parameters()) < 500 for m in models)


class Returns(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(3, 2), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x))


X, Y = normal(4, 3), labels(2, 4)


@pytest.mark.parametrize("repr", ["full", "matrix_free"])
@pytest.mark.parametrize(
    "form",
    [
        lambda f: {"logits": f, "hidden": f.exp()},
        lambda f: {"scores": f, "count": torch.tensor(4)},
        lambda f: (f, f.detach()),
        lambda f: [f],
    ],
    ids=["logits", "only one", "tuple", "list"],
)
def test_the_output_may_be_a_mapping_or_a_sequence(form: Callable[[Tensor], Any], repr: str) -> None:
    got = precond.curvature(seeded(lambda: Returns(form)), nn.CrossEntropyLoss(), X, Y, matrix="ggn", repr=repr)
    close(got.to_dense(), dense.ggn(seeded(lambda: Returns(lambda f: f)), nn.CrossEntropyLoss(), X, Y))


@pytest.mark.parametrize(
    ("form", "kind"), [(lambda f: (f, f.exp()), "tuple that holds 2"), (lambda f: {"f": f.detach()}, "dict that holds 0")]
)
def test_an_output_that_does_not_say_what_the_criterion_takes_is_refused(form: Callable[[Tensor], Any], kind: str) -> None:
    with pytest.raises(precond.ObservationError, match=f"returns a {kind} tensors.*wrap the model"):
        precond.curvature(Returns(form), nn.CrossEntropyLoss(), X.float(), Y, matrix="ggn", repr="full")


def test_an_object_with_logits_is_taken_as_it_is() -> None:
    case = SHRUNK["vit"]
    got = precond.curvature(case.make().model, case.criterion, {"pixel_values": case.inputs}, case.targets, matrix="ggn", repr="layer")
    close(got.to_dense(), dense_cells.REPRESENTATIONS["layer"](case, "ggn", None))


class Positions(nn.Module):
    """Tokens and positions to logits (N, V, T); the positions as one row of indices, as one example, or as one an example."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.tokens, self.positions = nn.Embedding(5, 3), nn.Embedding(6, 3)
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1])
        index = {"row": index, "one": index.unsqueeze(0), "each": index.expand_as(tokens)}[self.form]
        x = self.tokens(tokens) + self.positions(index)
        return self.head(torch.tanh(self.mix(x).cumsum(1))).transpose(1, 2)


TOKENS, NEXT = labels(5, 3, 3, seed=8), labels(5, 3, 3, seed=9)


def positions(form: str, matrix: str, repr: str, tokens: Tensor = TOKENS, target: Tensor = NEXT, **options: Any) -> Tensor:
    model = seeded(lambda: Positions(form))
    return precond.curvature(model, nn.CrossEntropyLoss(), tokens, target, matrix=matrix, repr=repr, seed=0, **options).to_dense()


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize(
    ("matrix", "repr"),
    [
        (m, r)
        for m, r in PAIRS
        if m in ("ggn", "empirical_fisher", "fisher_mc", "input_second_moment") and r in ("full", "kron_io", "diagonal")
    ],
)
@pytest.mark.parametrize("form", ["row", "one"])
@pytest.mark.filterwarnings(LEFT)
def test_an_embedding_shared_by_all_examples_counts_as_one_an_example(form: str, matrix: str, repr: str, size: int) -> None:
    got = positions(form, matrix, repr, TOKENS[:size], NEXT[:size], rows={"positions": "shared"})
    close(got, positions("each", matrix, repr, TOKENS[:size], NEXT[:size]))


@pytest.mark.parametrize("repr", ["full", "diagonal"])
def test_an_embedding_shared_by_all_examples_is_refused_where_it_is_not_said(repr: str) -> None:
    with pytest.raises(precond.ObservationError, match="'positions' has 1 leading rows for a batch of 3"):
        positions("one", "ggn", repr)


@pytest.mark.parametrize("repr", ["kron_io", "full", "diagonal", "layer_gram"])
@pytest.mark.parametrize(("form", "length"), [("row", 3), ("row", 6), ("one", 3)])
def test_positions_as_long_as_a_multiple_of_the_batch_are_refused_as_well(form: str, length: int, repr: str) -> None:
    """Their leading dimension tells nothing, but they count 0, 1, 2, ...; tokens in another order are tokens."""
    tokens, target = labels(5, 3, length, seed=8), labels(5, 3, length, seed=9)
    with pytest.raises(precond.ObservationError, match=r"'positions' (has|was called)"):
        positions(form, "ggn", repr, tokens, target)
    shared = positions(form, "ggn", repr, tokens, target, rows={"positions": "shared"})
    close(shared, positions("each", "ggn", repr, tokens, target))
    wrong = positions(form, "ggn", repr, tokens, target, rows={"positions": "flattened"}) if form == "row" else shared * 0
    assert (wrong - shared).norm() > 1e-3 * shared.norm(), "negative control: what would come of it"


def test_shared_rows_leave_the_loss_the_gradient_and_a_second_preconditioner_alone() -> None:
    def run(count: int) -> tuple[Tensor, list[Tensor]]:
        model, criterion = seeded(lambda: Positions("row")), nn.CrossEntropyLoss()
        for _ in range(count):
            make = precond.Preconditioner(matrix="empirical_fisher", repr="full", solver="cholesky", rows={"positions": "shared"})
            kept.append(make.attach(model, criterion))
        loss = criterion(model(TOKENS), NEXT)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    kept: list[precond.Preconditioner] = []
    plain = run(0)
    for count in (1, 2):
        close(run(count), plain)
    for preconditioner in kept:
        preconditioner.step()
    close(kept[1].operators["model"].to_dense(), kept[2].operators["model"].to_dense())
    close(kept[0].operators["model"].to_dense(), positions("each", "empirical_fisher", "full"))


class Encodings(nn.Module):
    """A Linear of position encodings, called once for all examples, or once an example."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each = each
        self.tokens, self.positions, self.head = nn.Embedding(5, 3), nn.Linear(2, 3), nn.Linear(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        encodings = normal(1, tokens.shape[1], 2, seed=4)
        encodings = encodings.expand(len(tokens), -1, -1) if self.each else encodings
        return self.head(torch.tanh((self.tokens(tokens) + self.positions(encodings)).cumsum(1))).transpose(1, 2)


def test_secant_pairs_of_layers_see_shared_rows_as_one_an_example() -> None:
    """Those of `kron_io` watch the layers once more after the update."""

    def run(each: bool) -> list[Tensor]:
        model, criterion = seeded(lambda: Encodings(each)), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        preconditioner = precond.Preconditioner(
            matrix="bfgs_hessian", repr="kron_io", solver="bfgs", damping=1e-2, history=0.9, rows={"positions": "shared"}
        )
        preconditioner.attach(model, criterion, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            criterion(model(TOKENS), NEXT).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    close(run(False), run(True))
