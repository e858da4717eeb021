"""One contender, one seed, one budget: train, and record every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precond.compare.contenders import Contender
from precond.compare.memory import peak_bytes
from precond.compare.tasks import Task
from precond.errors import PrecondError, UsageError

MEMORY_STEPS = 3
"""Steps of the memory measurement: the first allocates the state, the later ones hold it beside a backward pass."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every contender gets: this many steps on batches of this size."""

    steps: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(f"a budget needs at least one step and one example a batch, not {self.steps} and {self.batch_size}.")

    @classmethod
    def of_epochs(cls, epochs: int, batch_size: int, task: Task) -> Budget:
        """The budget of `epochs` passes over the training data of `task`; the incomplete last batch of a pass is left out."""
        return cls(steps=epochs * steps_per_epoch(task, batch_size), batch_size=batch_size)


@dataclass(kw_only=True)
class Run:
    """What happened in one training run.

    Attributes:
        losses: the loss of each step's batch, before its update.
        seconds: the wall time of each step: forward, backward and update, evaluation excluded.
        accuracies, accuracy_steps: the share of test examples classified right, after these many steps.
        diagnostics: the preconditioner's counters that are not zero.
        failure: why the run ended before its budget did, or `None`.
    """

    task: str
    contender: str
    seed: int
    lr: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    accuracy_steps: list[int] = field(default_factory=list)
    diagnostics: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


def steps_per_epoch(task: Task, batch_size: int) -> int:
    """Full batches in one pass over the training data (one, smaller, where there is less data than a batch)."""
    return max(1, len(task.train_inputs) // batch_size)


def train(
    task: Task,
    contender: Contender,
    *,
    lr: float,
    seed: int,
    budget: Budget,
    device: torch.device,
    on_step: Callable[[float], None] = lambda loss: None,
    evaluate: bool = True,
) -> Run:
    """Train a fresh model of `task` with `contender` for `budget`.

    The seed fixes the initial parameters, the order of the batches and torch's generator during the
    run, so contenders start alike and see the same batches. An error or a loss that is not finite
    ends the run and is kept in `Run.failure`, so that one contender cannot end the others' comparison.
    """
    run = Run(task=task.name, contender=contender.label, seed=seed, lr=lr)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model, criterion = task.make_model(seed).to(device), task.make_criterion().to(device)
        try:
            built = contender.build(model, criterion, lr)
            with built.preconditioner or nullcontext():  # leaves no hook behind
                _loop(run, task, model, criterion, built.optimizer, budget, device, on_step, evaluate=evaluate)
                if built.preconditioner is not None:
                    run.diagnostics = {name: count for name, count in built.preconditioner.diagnostics.items() if count}
        except (PrecondError, RuntimeError, ArithmeticError) as error:  # torch's out-of-memory and linear algebra errors are RuntimeErrors
            run.failure = f"{type(error).__name__}: {error}"
    return run


def _loop(
    run: Run,
    task: Task,
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    budget: Budget,
    device: torch.device,
    on_step: Callable[[float], None],
    *,
    evaluate: bool,
) -> None:
    every = steps_per_epoch(task, budget.batch_size)
    for step, (inputs, targets) in enumerate(_batches(task, run.seed, budget, device), start=1):
        loss, seconds = _step(model, criterion, optimizer, inputs, targets)
        if not math.isfinite(loss):
            run.failure = f"the loss was not finite at step {step}"
            return
        run.losses.append(loss)
        run.seconds.append(seconds)
        on_step(loss)
        if evaluate and (step % every == 0 or step == budget.steps):
            run.accuracies.append(_accuracy(model, task, device))
            run.accuracy_steps.append(step)


def peak_memory(task: Task, contender: Contender, *, lr: float, batch_size: int, device: torch.device) -> int | None:
    """The peak of bytes held by tensors from the making of the model through its first steps.

    Parameters, gradients, activations, the optimizer's state and the preconditioner's are all
    counted, the data set is not. `None` when the contender fails within those steps.
    """
    budget = Budget(steps=MEMORY_STEPS, batch_size=batch_size)
    failures: list[str | None] = []

    def work() -> None:
        failures.append(train(task, contender, lr=lr, seed=0, budget=budget, device=device, evaluate=False).failure)

    peak = peak_bytes(work, device)
    return None if failures != [None] else peak


def _step(model: nn.Module, criterion: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """The user's own loop, unchanged, under a clock."""
    _synchronise(inputs.device)
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = criterion(model(inputs), targets)
    loss.backward()
    optimizer.step()
    _synchronise(inputs.device)
    return float(loss.detach()), time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batches(task: Task, seed: int, budget: Budget, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, reshuffled every epoch, the incomplete last one of an epoch left out."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = task.train_inputs.to(device), task.train_targets.to(device)
    every, done = steps_per_epoch(task, budget.batch_size), 0
    while True:
        order = torch.randperm(len(inputs), generator=generator).to(device)
        for rows in order.split(budget.batch_size)[:every]:
            if done == budget.steps:
                return
            done += 1
            yield inputs[rows], targets[rows]


@torch.no_grad()
def _accuracy(model: nn.Module, task: Task, device: torch.device) -> float:
    training = model.training
    model.eval()
    outputs = model(task.test_inputs.to(device))
    model.train(training)
    return float((outputs.argmax(dim=-1) == task.test_targets.to(device)).float().mean())
