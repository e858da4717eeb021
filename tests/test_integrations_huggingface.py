"""Claims about `precond.integrations.huggingface.attach`, whose loop is `out = model(**batch); out.loss.backward(); optimizer.step()`.

- The curvature is that of the same loss written outside by hand with `observe`, and the dense oracle's, to 1e-10; for every kind of
  observation so is the training run. The causal shift and ignored labels are part of it; without the shift it is another matrix.
- The task is found: causal and masked language models, tokens, sequences (classes, regression, multi-label), images; by value, where nothing
  declares it.
- `num_items_in_batch`: a batch in parts is the batch, in both settings of rule 1; a part without terms adds nothing; without it it is not.
- A loss that is none of these is refused in the model's forward, in one sentence; so are a tuple, no loss, and two readings that agree.
- State, `remove`, frozen parameters, evaluation, AMP's scale, a loss that is not finite, and many parts of one step are as elsewhere.
- Nothing of this imports `transformers`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
import precond
from nets import gpt2, labels, normal, seeded, vit
from precond import ObservationError, Preconditioner, UsageError
from precond.integrations.huggingface import attach
from training import EXACT, KINDS, make, sgd, theta

close = partial(torch.testing.assert_close, **EXACT)

V, T, N = 5, 4, 3
TOKENS = labels(V, N, T, seed=8)
LABELS = labels(V, N, T, seed=9)
LABELS[0, 2:] = LABELS[1, 0] = LABELS[2, 3] = -100


@dataclass
class Output:
    loss: Tensor | None = None
    logits: Tensor | None = None


class Causal(nn.Module):
    """The form of a causal language model, with its loss in float64 (those of `transformers` are in float32)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, 3), nn.Embedding(T, 3)
        self.lower, self.head = nn.Linear(3, 3), nn.Linear(3, V)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]).unsqueeze(0))
        logits = self.head(torch.tanh(self.lower(x).cumsum(1)))
        return Output(None if labels is None else self.loss(logits, labels, **kwargs), logits)

    def loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def causal(kind: type[nn.Module] = Causal) -> nn.Module:
    return seeded(kind)


class Shifted(nn.Module):
    """Logits of the positions that have a next one, (N (T - 1), V), for the oracle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits[:, :-1].flatten(0, 1)


class Flat(Shifted):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits.flatten(0, 1)


def matrix_of(preconditioner: Preconditioner) -> Tensor:
    (operator,) = preconditioner.operators.values()
    return operator.to_dense()


def observed(model: nn.Module, preconditioner: Preconditioner, **batch: Any) -> Preconditioner:
    """One observed step without an update."""
    attach(preconditioner, model)
    model(**batch).loss.backward()
    preconditioner.step()
    return preconditioner


def by_hand(model: nn.Module, preconditioner: Preconditioner, tokens: Tensor, target: Tensor) -> Preconditioner:
    preconditioner.attach(model, "categorical")
    output, target = model(input_ids=tokens).logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()
    preconditioner.observe(F.cross_entropy(output, target), output, target).backward()
    preconditioner.step()
    return preconditioner


@pytest.mark.parametrize("build", [causal, lambda: seeded(gpt2)], ids=["ours", "gpt2"])
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_the_curvature_is_that_of_the_shifted_loss_by_hand_and_of_the_oracle(build: Callable[[], nn.Module], matrix: str) -> None:
    shared = {"*positions": "shared", "*wpe": "shared"}
    if build is not causal and matrix == "empirical_fisher":  # the true gradient went through their loss, which is in float32
        got = matrix_of(observed(build(), make(matrix), input_ids=TOKENS, labels=LABELS))
        want = dense.empirical_fisher(Shifted(build()), nn.CrossEntropyLoss(), TOKENS, LABELS[:, 1:].flatten())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        return
    got = matrix_of(observed(build(), make(matrix), input_ids=TOKENS, labels=LABELS))
    close(got, matrix_of(by_hand(build(), make(matrix, rows=shared), TOKENS, LABELS)))
    close(got, getattr(dense, matrix)(Shifted(build()), nn.CrossEntropyLoss(), TOKENS, LABELS[:, 1:].flatten()))
    unshifted = getattr(dense, matrix)(Flat(build()), nn.CrossEntropyLoss(), TOKENS, LABELS.flatten())
    assert (got - unshifted).norm() > 1e-2 * got.norm()


def batches(steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [
        (labels(V, N, T, seed=20 + k), torch.where(normal(N, T, seed=30 + k) > 1, -100, labels(V, N, T, seed=40 + k))) for k in range(steps)
    ]


def train(make: Callable[..., Preconditioner], step: Callable[..., None], hand: bool) -> Tensor:
    model = causal()
    optimizer, preconditioner = sgd(model), make()
    if hand:
        preconditioner.options.rows["positions"] = "shared"
        preconditioner.attach(model, nn.CrossEntropyLoss(), optimizer)
    else:
        attach(preconditioner, model, optimizer)
    criterion = preconditioner._session.criteria[0][0] if hand else None
    for tokens, target in batches():
        optimizer.zero_grad()
        step(model, criterion, tokens, target)
        optimizer.step()
    return theta(model)


def theirs(model: nn.Module, criterion: None, tokens: Tensor, target: Tensor) -> None:
    model(input_ids=tokens, labels=target).loss.backward()


def outside(model: nn.Module, criterion: nn.Module, tokens: Tensor, target: Tensor) -> None:
    criterion(model(input_ids=tokens).logits[:, :-1].reshape(-1, V), target[:, 1:].reshape(-1)).backward()


def in_parts(model: nn.Module, criterion: None, tokens: Tensor, target: Tensor) -> None:
    items = (target[:, 1:] != -100).sum()
    for part in (slice(0, 1), slice(1, 3)):
        model(input_ids=tokens[part], labels=target[part], num_items_in_batch=items).loss.backward()


PAIRED = {repr: partial(make, "bfgs_hessian", repr, "bfgs", 1e-2, history=beta) for repr, beta in (("full", "local"), ("kron_io", 0.9))}


@pytest.mark.parametrize("kind", [*KINDS, *PAIRED])
def test_the_training_run_is_that_of_a_criterion_outside(kind: str) -> None:
    build = {**KINDS, **PAIRED}[kind]
    close(train(build, theirs, False), train(build, outside, True))


@pytest.mark.parametrize("weights", ["normalised", "given"])
@pytest.mark.parametrize("kind", ["ggn_full", "ef_full", "hessian_free", "newton"])
def test_a_batch_in_parts_with_num_items_is_the_batch(kind: str, weights: str) -> None:
    options = {
        "ggn_full": partial(make, loss_weights=weights),
        "ef_full": partial(make, "empirical_fisher", loss_weights=weights),
        "hessian_free": partial(make, repr="matrix_free", solver="cg", loss_weights=weights),
        "newton": partial(make, "hessian", "full", "lu", 2.0, loss_weights=weights),
    }
    close(train(options[kind], in_parts, False), train(options[kind], outside, True))


def test_a_batch_in_parts_without_num_items_is_not_the_batch() -> None:
    def unweighted(model: nn.Module, criterion: None, tokens: Tensor, target: Tensor) -> None:
        for part in (slice(0, 1), slice(1, 3)):
            model(input_ids=tokens[part], labels=target[part]).loss.backward()

    assert (train(make, unweighted, False) - train(make, outside, True)).norm() > 1e-3


def test_a_part_without_terms_adds_nothing() -> None:
    model = causal()
    preconditioner = attach(make(), model)
    ignored = torch.full_like(LABELS, -100)
    for target in (ignored, LABELS):
        model(input_ids=TOKENS, labels=target, num_items_in_batch=int((LABELS[:, 1:] != -100).sum())).loss.backward()
    preconditioner.step()
    close(matrix_of(preconditioner), matrix_of(observed(causal(), make(), input_ids=TOKENS, labels=LABELS)))


# -- tasks -----------------------------------------------------------------------------------------------------------


def bert(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4, "vocab_size": V}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**sizes, **no_dropout, max_position_embeddings=T, initializer_range=0.5, **options)
        return getattr(transformers, f"BertFor{kind}")(config)

    return lambda: seeded(build)


CE, CLASSES = nn.CrossEntropyLoss(), labels(3, N)
IDS = {"input_ids": TOKENS}
TASKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Tensor, nn.Module, str]] = {
    "causal": (lambda: seeded(gpt2), IDS, LABELS, CE, "causal_lm"),
    "masked": (bert("MaskedLM"), IDS, LABELS, CE, "classification"),
    "tokens": (bert("TokenClassification", num_labels=3), IDS, LABELS.clamp(max=2), CE, "classification"),
    "sequences": (bert("SequenceClassification", num_labels=3), IDS, CLASSES, CE, "classification"),
    "images": (lambda: seeded(vit), {"pixel_values": normal(N, 1, 4, 4)}, CLASSES, CE, "classification"),
    "regression": (bert("SequenceClassification", num_labels=1), IDS, normal(N), nn.MSELoss(), "regression"),
    "regressions": (
        bert("SequenceClassification", num_labels=2, problem_type="regression"), IDS, normal(N, 2), nn.MSELoss(), "regression",
    ),
    "multi-label": (
        bert("SequenceClassification", num_labels=3), IDS, labels(2, N, 3).double(), nn.BCEWithLogitsLoss(), "multi_label",
    ),
}  # fmt: skip


class Logits(nn.Module):
    """What the criterion takes, for the oracle: classes last in two dimensions."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, **inputs: Tensor) -> Tensor:
        logits = self.model(**inputs).logits
        logits = logits[:, :-1] if self.task == "causal_lm" else logits
        return logits.flatten(0, -2)


# `masked`: its prediction head owns a bias that is tied to its child's, which the generic rule must not take for one value (tie_weights=False).
@pytest.mark.parametrize("name", TASKS)
def test_the_task_is_found_and_the_curvature_is_the_oracles(name: str) -> None:
    build, inputs, target, criterion, task = TASKS[name]
    model = build()
    preconditioner = observed(model, make("ggn", "full"), **inputs, labels=target)
    assert preconditioner._session.criteria[0][0].task == task
    target = target[:, 1:] if task == "causal_lm" else target
    target = target.flatten() if criterion is CE else target.reshape(N, -1)
    close(matrix_of(preconditioner), dense.ggn(Logits(build(), task), criterion, inputs, target))


@pytest.mark.parametrize("repr", ["kron_io", "kron_dim", "unit", "diagonal", "layer"])
def test_their_gpt2_trains_in_every_representation(repr: str) -> None:
    model = seeded(gpt2)
    optimizer = sgd(model)
    solver = {"kron_dim": precond.solvers.Eigen(), "diagonal": "elementwise"}.get(repr, "cholesky")
    preconditioner = attach(make("ggn", repr, solver, 0.1), model, optimizer)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert preconditioner.diagnostics["observations"] == 5


# -- refusals --------------------------------------------------------------------------------------------------------


class Smoothed(Causal):
    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


class Auxiliary(Causal):
    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return super().loss(logits, labels) + 0.01 * logits.square().mean()


class WithoutLoss(Causal):
    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return None


class AsTuple(Causal):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        output = super().forward(input_ids, labels)
        return output.loss, output.logits


class WithoutLogits(Causal):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return {"loss": super().forward(input_ids, labels).loss}


class Alike(Causal):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


REFUSED: dict[str, tuple[type[nn.Module], type[Exception], str]] = {
    "label smoothing": (Smoothed, ObservationError, r"returned the loss .*not the one its labels and logits give.*label smoothing"),
    "auxiliary": (Auxiliary, ObservationError, r"returned the loss .*\(causal_lm .*classification .*auxiliary losses off"),
    "no loss": (WithoutLoss, ObservationError, "was called with labels and returned no `loss`"),
    "tuple": (AsTuple, ObservationError, "returned a tuple.*return_dict=True"),
    "no logits": (WithoutLogits, ObservationError, "returned no tensor of `logits`"),
    "alike": (Alike, UsageError, r"could be that of 'causal_lm' or 'classification'.*attach\(\.\.\., task='causal_lm'\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_cannot_be_read_is_refused_in_the_forward_pass(name: str) -> None:
    kind, error, message = REFUSED[name]
    model = causal(kind)
    attach(make(), model)
    target = LABELS.clone()
    target[:, 0] = 0  # alike: as many labels without the shift
    with pytest.raises(error, match=message):
        model(TOKENS, labels=target)


def test_their_tuple_is_refused() -> None:
    model = seeded(gpt2)
    attach(make(), model)
    with pytest.raises(ObservationError, match="GPT2LMHeadModel returned a tuple"):
        model(input_ids=TOKENS, labels=LABELS, return_dict=False)


def test_two_readings_that_agree_need_the_task() -> None:
    model = causal(Alike)
    attach(make(), model, task="causal_lm")
    model(TOKENS, LABELS).loss.backward()
    wrong = causal()
    attach(make(), wrong, task="classification")
    with pytest.raises(ObservationError, match=r"\(classification [\d.]+\)"):
        wrong(TOKENS, LABELS)


def test_arguments_without_a_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="task='lm': choose one of 'causal_lm'"):
        attach(make(), causal(), task="lm")
    with pytest.raises(UsageError, match=r"Linear.forward takes no `labels`"):
        attach(make(), nn.Linear(3, 2))
    model = causal()
    preconditioner = attach(make(), model)
    model(TOKENS).logits.sum().backward()
    with pytest.raises(UsageError, match=r"differentiated no loss .*with `labels`"):
        preconditioner.step()
    with pytest.raises(UsageError, match=r"observe\(\) needs to know"):
        preconditioner.observe(torch.zeros(()), torch.zeros(()), torch.zeros(()))


# -- the rest of the library -----------------------------------------------------------------------------------------


def test_state_goes_on() -> None:
    def run(stop: int) -> Tensor:
        model = causal()
        optimizer, preconditioner = sgd(model), attach(KINDS["kfac"](), model)
        for step, (tokens, target) in enumerate(batches(4)):
            if step == stop:
                state = preconditioner.state_dict()
                preconditioner.remove()
                assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
                preconditioner = KINDS["kfac"]()
                preconditioner.load_state_dict(state)
                attach(preconditioner, model)
            optimizer.zero_grad()
            theirs(model, None, tokens, target)
            preconditioner.step()
            optimizer.step()
        return theta(model)

    close(run(2), run(9))


def test_a_parameter_frozen_in_training_is_noticed() -> None:
    model = causal()
    optimizer, preconditioner = sgd(model), make("ggn", "layer")
    attach(preconditioner, model, optimizer)
    for step, (tokens, target) in enumerate(batches(3)):
        if step == 1:
            model.lower.requires_grad_(False)
        optimizer.zero_grad()
        theirs(model, None, tokens, target)
        optimizer.step()
    assert preconditioner.diagnostics["observations"] == 3
    assert "lower" not in preconditioner.operators


def test_evaluation_between_and_a_scaled_loss_change_nothing() -> None:
    def run(disturbed: bool) -> Tensor:
        model = causal()
        optimizer = sgd(model)
        preconditioner = attach(make(), model)
        for tokens, target in batches():
            optimizer.zero_grad()
            if disturbed:
                with torch.no_grad():
                    model(input_ids=tokens, labels=target)
                model(input_ids=tokens)  # no labels, so no loss
            (model(input_ids=tokens, labels=target).loss * (1024 if disturbed else 1)).backward()
            for p in model.parameters():
                p.grad /= 1024 if disturbed else 1
            preconditioner.step()
            optimizer.step()
        return theta(model)

    close(run(True), run(False))


@pytest.mark.parametrize("kind", ["ef_full", "ggn_full"])
def test_more_parts_of_a_step_than_may_stay_undifferentiated(kind: str) -> None:
    """A loss beside the logits is a second output: the records of such passes are bounded, but not those that a step is made of."""
    tokens, target = labels(V, 20, T, seed=60), labels(V, 20, T, seed=61)

    def run(parts: int) -> Tensor:
        model, preconditioner = causal(), KINDS[kind]()
        attach(preconditioner, model)
        for x, y in zip(tokens.chunk(parts), target.chunk(parts), strict=True):
            model(input_ids=x, labels=y, num_items_in_batch=20 * (T - 1)).loss.backward()
        preconditioner.step()
        return matrix_of(preconditioner)

    close(run(20), run(1))


def test_a_loss_that_is_not_finite_is_left_to_the_step() -> None:
    model = causal()
    preconditioner = attach(make(), model)
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    model(input_ids=TOKENS, labels=LABELS).loss.backward()
    preconditioner.step()
    assert preconditioner.diagnostics["observations_dropped"] == 1


def test_nothing_imports_transformers() -> None:
    code = "import precond, sys; assert 'precond.integrations' not in sys.modules; import precond.integrations.huggingface"
    source = Path(precond.__file__).parents[1]
    subprocess.run([sys.executable, "-c", f"{code}; assert 'transformers' not in sys.modules"], check=True, env={"PYTHONPATH": str(source)})
