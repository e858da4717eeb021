"""Hugging Face models: their forward takes `labels` and returns the loss, so that no criterion is called that could be hooked.

What is needed is read from the call: `labels` from its arguments, `logits` and `loss` from its output. What the loss stands for is
the one of a few readings whose value is the loss that was returned, so that label smoothing, an auxiliary loss or a task
that is not known here is noticed, and refused.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precond.distributed import unwrap
from precond.errors import ObservationError, UsageError
from precond.observe import SHARED, LossReader, OwnLoss, canonical, field_of
from precond.preconditioner import Preconditioner

TASKS = ("causal_lm", "classification", "regression", "multi_label")
_PROBLEMS = {"regression": "regression", "single_label_classification": "classification", "multi_label_classification": "multi_label"}
_IGNORED = -100


def attach(
    preconditioner: Preconditioner, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, task: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Preconditioner:  # fmt: skip
    """Bind to a model that computes its own loss; the loop stays `out = model(**batch); out.loss.backward(); optimizer.step()`.

    The matrix is that of the loss the model returns, logits f and labels y:

    | task | loss | models |
    |---|---|---|
    | `causal_lm` | cross-entropy of f[:, :-1] with y[:, 1:] | GPT-2, Llama, ... |
    | `classification` | cross-entropy of f with y, of shapes (*, C) and (*) | masked LM, tokens, sequences, images |
    | `regression` | mean squared error | sequences with problem_type="regression" |
    | `multi_label` | BCE with logits | sequences with problem_type="multi_label_classification" |

    Terms with label -100 count nowhere. Means are over the n terms that count; with `num_items_in_batch` the loss is their sum
    divided by it, which is a mean of weight n / num_items_in_batch (rule 1): over the parts of an accumulated batch the
    weights sum to 1. An embedding that is called once for all examples (positions) is `rows="shared"`, unless `rows=` says
    otherwise.

    Args:
        preconditioner: one that is not attached yet. Its `state_dict`, `describe`, `remove` are as ever.
        model: plain or DDP; any module whose forward takes `labels` and returns an object or mapping with `loss` and `logits`.
        task: a name of the table; found at the first observed loss when None, by `config.problem_type` and by value.
        optimizer, scaler: as `Preconditioner.attach` takes them. With a `Trainer` give it this optimizer:
            `Trainer(..., optimizers=(optimizer, scheduler))`, and attach before `train()`.

    Cost: the loss once more without a graph, and one synchronisation with the device, a call of an observed step.

    Raises:
        ValueError: an unknown task. UsageError: the model takes no labels; or, in its forward, two readings have the value of
            the loss, so that `task=` must say which it is. ObservationError, in its forward: the loss is none of the above
            (label smoothing, an auxiliary loss), or the model returned no loss, or a tuple.

    >>> class Model(nn.Module):  # the form of a Hugging Face model
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head = nn.Linear(3, 2)
    ...     def forward(self, x, labels=None):
    ...         logits = self.head(x)
    ...         return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
    >>> model = Model()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> preconditioner = attach(Preconditioner(matrix="ggn", repr="kron_io", solver="cholesky"), model, optimizer)
    >>> model(x=torch.randn(8, 3), labels=torch.randint(2, (8,)))["loss"].backward()
    >>> optimizer.step()
    >>> preconditioner.diagnostics["refreshes"]
    1
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task={task!r}: choose one of {', '.join(map(repr, TASKS))}, or None.")
    inner = unwrap(model)
    if not _takes_labels(inner):
        raise UsageError(
            f"{type(inner).__name__}.forward takes no `labels`, so it computes no loss: use preconditioner.attach(model, criterion, optimizer)."
        )
    return preconditioner.attach(model, HuggingFaceLoss(task), optimizer, scaler=scaler)


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@dataclass(frozen=True)
class _Reading:
    """loss = criterion summed over terms / (the number of terms, or `items`)."""

    task: str
    criterion: nn.Module
    output: Tensor
    target: Tensor
    items: Tensor | None

    def terms(self) -> Tensor:
        """What the mean divides by."""
        if isinstance(self.criterion, nn.CrossEntropyLoss):
            return (self.target != _IGNORED).sum()
        return torch.tensor(self.target.numel(), device=self.target.device)

    def value(self) -> Tensor:
        """The loss as the model should have returned it, in at least float32."""
        output = self.output.detach()
        output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            target = self.target.to(output) if self.target.is_floating_point() else self.target
            summed = type(self.criterion)(reduction="sum").forward(output, target)
            value: Tensor = summed / (self.terms() if self.items is None else self.items.to(summed.device))
        return value


class HuggingFaceLoss(LossReader):
    """Reads `labels`, `logits` and `loss`; the task, once found, stays."""

    def __init__(self, task: str | None = None) -> None:
        self.task = task

    def rows(self, model: nn.Module) -> Mapping[str, str]:
        return {canonical(name): SHARED for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> OwnLoss | None:
        given = _named(model, args, kwargs)
        if not isinstance(labels := given.get("labels"), Tensor):
            return None
        loss, logits = field_of(output, "loss"), field_of(output, "logits")
        name = type(model).__name__
        if isinstance(output, tuple) and loss is None:
            raise ObservationError(f"{name} returned a tuple, in which the loss has no name: call it with return_dict=True.")
        if not isinstance(loss, Tensor) or not isinstance(logits, Tensor) or loss.numel() != 1:
            raise ObservationError(
                f"{name} was called with labels and returned no {'`loss` of one number' if isinstance(logits, Tensor) else 'tensor of `logits`'}, "
                "so what its loss stands for cannot be read: attach with a criterion or a likelihood, and call `preconditioner.observe`."
            )
        if not loss.requires_grad:
            return None
        found = self._find(model, logits, labels.to(logits.device), given.get("num_items_in_batch"), loss.detach().reshape(()))
        if found.items is None:
            return OwnLoss(loss, found.criterion, found.output, found.target)
        terms = found.terms()
        if not bool(terms):  # adds nothing to the sum over the batch, whose divisor is not its own
            return None
        return OwnLoss(loss, found.criterion, found.output, found.target, terms.to(torch.float64) / found.items.to(terms.device))

    def _find(self, model: nn.Module, logits: Tensor, labels: Tensor, items: Any, loss: Tensor) -> _Reading:
        """The reading whose value is the loss."""
        readings = [r for r in _readings(model, logits, labels, items) if self.task in (None, r.task)]
        agreed = (r for r in readings if _agree(r.value(), loss))
        agreeing = list(agreed if self.task is None else itertools.islice(agreed, 1))
        telling = [r for r in agreeing if bool(loss.isfinite()) and bool(r.terms())]  # NaN is any of them, and so is a sum of nothing
        tasks = sorted({r.task for r in telling})
        if len(tasks) > 1:
            raise UsageError(
                f"the loss of {type(model).__name__} could be that of {' or '.join(map(repr, tasks))}, as all its logits are alike: say which, "
                f"attach(..., task={tasks[0]!r})."
            )
        if not agreeing:
            values = ", ".join(f"{r.task} {float(r.value()):.6g}" for r in readings) or "none for logits and labels of these shapes"
            raise ObservationError(
                f"{type(model).__name__} returned the loss {float(loss):.6g} for logits {tuple(logits.shape)} and labels {tuple(labels.shape)}, "
                f"which is not the one its labels and logits give ({values}): turn label smoothing and auxiliary losses off, or attach with a "
                "likelihood and call `preconditioner.observe`."
            )
        if telling:
            self.task = telling[0].task
        return (telling or agreeing)[0]


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the call by name."""
    named = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    return {**named, **kwargs}


def _readings(model: nn.Module, logits: Tensor, labels: Tensor, items: Any) -> Iterator[_Reading]:
    """What the loss may stand for: by `config.problem_type` where the model has one, and by the shapes."""
    declared = _PROBLEMS.get(getattr(getattr(model, "config", None), "problem_type", None) or "")
    divisors = [None] if items is None else [torch.as_tensor(items, dtype=torch.float64), None]  # older models do not use it
    for task, criterion, output, target in _pairs(logits, labels):
        if declared in (None, task) or task == "causal_lm":
            for divisor in divisors:
                yield _Reading(task, criterion, output, target, divisor)


def _pairs(logits: Tensor, labels: Tensor) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    classes = logits.shape[-1] if logits.dim() > 1 else 1
    indices = not labels.is_floating_point()
    if indices and classes > 1 and labels.numel() * classes == logits.numel():
        output = logits.reshape(-1, classes)
        if logits.dim() == 3 and labels.dim() == 2:
            following = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)  # rather than cut the logits, which would copy them
            yield "causal_lm", nn.CrossEntropyLoss(), output, following.reshape(-1)
        yield "classification", nn.CrossEntropyLoss(), output, labels.reshape(-1)
    if labels.numel() == logits.numel():
        target = labels.reshape(logits.shape).to(logits.dtype)
        yield "regression", nn.MSELoss(), logits, target
        yield "multi_label", nn.BCEWithLogitsLoss(), logits, target


def _agree(value: Tensor, loss: Tensor) -> bool:
    """Equal to the rounding of the less precise of the two; what is not finite agrees with what is not finite either."""
    if not bool(loss.isfinite()):
        return not bool(value.isfinite())
    precision = max(torch.finfo(value.dtype).eps, torch.finfo(loss.dtype).eps)
    return bool((value - loss).abs() <= 2 * precision**0.75 * loss.abs().clamp(min=1.0))
