"""Histories: how statistics of one step are merged with those before. Only statistics are, and each entry says how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.errors import UnknownName
from precond.merging import COUNT, WEIGHT, Accumulator, History, average, check_shape, divide
from precond.registry import closest
from precond.statistics import GRAM, Stat, Statistics

__all__ = ["COUNT", "WEIGHT", "Ema", "History", "Local", "Mean", "Sum", "Window", "resolve"]


@dataclass(frozen=True, kw_only=True)
class Local(History):
    """The last observation alone."""

    def _merge(self, result: Statistics, name: str, x: Tensor, stat: Stat, valid: Tensor) -> None:
        old: Tensor | None = result.get(name)
        weight = valid.to(torch.float64)
        # rows may change in number: an invalid observation is then zeros, since only the device knows that it is invalid
        if old is not None and old.shape == x.shape:
            result[name], result[name + WEIGHT] = torch.where(valid, x, old), torch.maximum(weight, result[name + WEIGHT])
        else:
            result[name], result[name + WEIGHT] = x.clone(), weight

    def _read(self, statistics: Statistics, name: str, stat: Stat) -> Tensor:
        value: Tensor = statistics[name]
        return value


@dataclass(frozen=True)
class Ema(Accumulator):
    """S <- beta S + (1 - beta) X from S = 0, divided by its weight.

    Args:
        beta: the weight of the OLD value, in [0, 1).
        debias: divide by the weight 1 - beta^t, so that the average of a constant is that constant from the first step.
        schedule: "constant"; "martens": beta_t = min(1 - 1/t, beta), a plain mean until beta is reached; or "first": the first observation
            is copied, S_1 = X_1 (Eva, TNT, mini-block Fisher). The last two need no bias correction.

    >>> spec = {"A": Stat("mean")}
    >>> history = Ema(0.9)
    >>> history.read(history.merge(None, {"A": torch.ones(2)}, spec), spec)["A"]
    tensor([1., 1.])
    """

    beta: float
    debias: bool = True
    schedule: Literal["constant", "martens", "first"] = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta is the weight of the old value and lies in [0, 1), not {self.beta}; for one step use history='local'.")
        if self.schedule not in ("constant", "martens", "first"):
            raise ValueError(f"the schedule of an Ema is 'constant', 'martens' or 'first', not {self.schedule!r}.")

    def _rates(self, result: Statistics, name: str, x: Tensor, valid: Tensor) -> tuple[float | Tensor, float | Tensor]:
        if self.schedule == "constant":
            return self.beta, 1 - self.beta
        count = result.get(name + COUNT)
        count = torch.zeros((), dtype=torch.float64, device=x.device) if count is None else count
        result[name + COUNT] = count + valid.to(count.dtype)
        beta = (1 - 1 / (count + 1)).clamp(max=self.beta) if self.schedule == "martens" else self.beta * (count > 0).to(count.dtype)
        return beta, 1 - beta

    def _read(self, statistics: Statistics, name: str, stat: Stat) -> Tensor:
        value: Tensor = statistics[name]
        return super()._read(statistics, name, stat) if self.debias else value


@dataclass(frozen=True)
class Sum(Accumulator):
    """The sum of all observations, S <- decay S + X, as in AdaGrad and Shampoo.

    Args:
        initial: enters once: initial * I for an entry of form "matrix", initial everywhere for "diagonal", nothing for "plain".
        decay: in (0, 1]; below 1 the old is forgotten and the sum is bounded, 1 / (1 - decay) times an average (TONGA).

    >>> spec = {"L": Stat("mean", form="matrix")}
    >>> history = Sum(0.5)
    >>> history.read(history.merge(None, {"L": torch.ones(2, 2)}, spec), spec)["L"]
    tensor([[1.5000, 1.0000],
            [1.0000, 1.5000]])
    """

    initial: float = 0.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial < float("inf"):
            raise ValueError(f"the initial value of a Sum is finite and at least 0, not {self.initial}.")
        if not 0 < self.decay <= 1:
            raise ValueError(f"the decay of a Sum is what the old is multiplied by and lies in (0, 1], not {self.decay}.")

    def supports(self, stat: Stat) -> bool:
        return super().supports(stat) and (stat.kind != "rows" or self.initial == 0)  # a multiple of I has no few rows

    def _start(self, x: Tensor, stat: Stat) -> Tensor:
        if stat.form == "matrix":
            return self.initial * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
        return torch.full_like(x, self.initial if stat.form == "diagonal" else 0.0)

    def _rates(self, result: Statistics, name: str, x: Tensor, valid: Tensor) -> tuple[float | Tensor, float | Tensor]:
        return self.decay, 1.0

    def _read(self, statistics: Statistics, name: str, stat: Stat) -> Tensor:
        value: Tensor = statistics[name]
        return torch.where(statistics[name + WEIGHT] > 0, value, torch.zeros_like(value))


@dataclass(frozen=True, kw_only=True)
class Mean(Accumulator):
    """The mean of all observations."""

    def _rates(self, result: Statistics, name: str, x: Tensor, valid: Tensor) -> tuple[float | Tensor, float | Tensor]:
        return 1.0, 1.0


@dataclass(frozen=True)
class Window(History):
    """The last m observations, as in M-FAC and GGT.

    Entries averaged are kept as a stack of m. Rows are concatenated, oldest first, and scaled so that rows^T rows is the mean over the
    observations (M-FAC) or their sum (GGT); their Gram matrix, where it is asked for, rolls with them: n p a new row where there are n.
    An invalid observation is left out; where it brings another number of rows than the one it would push out, it takes a place of zeros
    in the window instead, with weight 0, since the device decides what is valid and the host what the shapes are.

    Args:
        m: the number of observations.
        reduction: "mean" or "sum", over the observations so far; or "padded", the sum divided by m, as if zeros were in the places that
            none has yet (M-FAC).
        decay: in (0, 1], the weight of each observation against the next one's (GGT).

    >>> spec = {"U": Stat("rows")}
    >>> history, kept = Window(2), None
    >>> for x in (1.0, 2.0, 3.0):
    ...     kept = history.merge(kept, {"U": torch.full((1, 1), x)}, spec)
    >>> history.read(kept, spec)["U"].square().sum()  # (4 + 9) / 2
    tensor(6.5000)
    """

    m: int
    reduction: Literal["mean", "sum", "padded"] = "mean"
    decay: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"a Window holds a whole number of observations, at least 1, not {self.m!r}.")
        if self.reduction not in ("mean", "sum", "padded"):
            raise ValueError(f"the reduction of a Window is 'mean', 'sum' or 'padded', not {self.reduction!r}.")
        if not 0 < self.decay <= 1:
            raise ValueError(f"the decay of a Window is the weight of an observation against the next one's, in (0, 1], not {self.decay}.")

    def _merge(self, result: Statistics, name: str, x: Tensor, stat: Stat, valid: Tensor) -> None:
        weight = result.get(name + WEIGHT, torch.zeros(self.m, dtype=torch.float64, device=x.device))  # of each place, oldest first
        pushed = torch.cat([weight[1:] * self.decay, valid.to(weight.dtype)[None]])
        if stat.kind == "mean":
            stack = result.get(name, x.new_zeros(self.m, *x.shape))
            check_shape(name, stack[0], x)
            new, exchangeable = torch.cat([stack[1:] * self.decay, x[None]]), True
        else:
            # how many rows each place has: on the CPU, where shapes are known
            counts = result.get(name + COUNT, torch.zeros(self.m, dtype=torch.int64))
            stack, gone = result.get(name, x[:0]), int(counts[0])
            if len(stack) and len(x) and stack.shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"the rows {name!r} changed their shape from {tuple(stack.shape[1:])} to {tuple(x.shape[1:])}, so that one window cannot hold "
                    "both: give all batches the same length, or use history='local'."
                )
            aged = stack[gone:] * self.decay ** (stat.degree / 2) if self.decay < 1 else stack[gone:]
            new = torch.cat([part for part in (aged, x) if len(part)] or [x])
            exchangeable = bool((counts == x.shape[0]).all())
            result[name + COUNT] = torch.cat([counts[1:], torch.tensor([x.shape[0]])])
            if stat.gram:
                old = result.get(name + GRAM)
                rolled = _rolled(None if old is None else old * self.decay**stat.degree, new, gone, len(x))
                result[name + GRAM] = rolled if old is None or not exchangeable else torch.where(valid, rolled, old)
        result[name] = torch.where(valid, new, stack) if exchangeable else new
        result[name + WEIGHT] = torch.where(valid, pushed, weight) if exchangeable else pushed

    def _read(self, statistics: Statistics, name: str, stat: Stat) -> Tensor:
        value: Tensor = statistics[name]
        weight = self._weight(statistics, name)
        return divide(value.sum(0), weight) if stat.kind == "mean" else average(value, weight, stat)

    def _weight(self, statistics: Statistics, name: str) -> Tensor:
        weights: Tensor = statistics[name + WEIGHT]
        return weights.sum() if self.reduction == "mean" else weights.new_full((), self.m if self.reduction == "padded" else 1)

    def read(self, statistics: Statistics, spec: Mapping[str, Stat]) -> Statistics:
        grams = {
            name + GRAM: divide(statistics[name + GRAM], self._weight(statistics, name) ** stat.degree)
            for name, stat in spec.items() if stat.gram and name + GRAM in statistics
        }  # fmt: skip
        return super().read(statistics, spec) | grams


def _rolled(old: Tensor | None, rows: Tensor, gone: int, new: int) -> Tensor:
    """The Gram matrix (*batch, n, n) of rows (n, *batch, p) whose last `new` are new, from the old one, whose first `gone` rows left."""
    stack = rows.movedim(0, -2)
    kept = len(rows) - new
    added = stack @ stack[..., kept:, :].mT
    if old is None:
        return added if not kept else stack @ stack.mT
    top = torch.cat([old[..., gone:, gone:], added[..., :kept, :]], -1)
    return torch.cat([top, added.mT], -2)


def resolve(history: str | float | History) -> History:
    """A history, from one, from "local", or from the weight of the old value of an `Ema`.

    >>> resolve(0.95)
    Ema(beta=0.95, debias=True, schedule='constant')
    """
    if isinstance(history, History):
        return history
    if history == "local":
        return Local()
    if isinstance(history, str):
        raise UnknownName(f"{history!r} is not a history{closest(history, ['local'])} Or give a number or an object of precond.history.")
    if isinstance(history, bool) or not isinstance(history, (int, float)):
        raise TypeError(f"history is 'local', a number in (0, 1) or an object of precond.history, not a {type(history).__name__}.")
    if not 0 < history < 1:
        raise ValueError(f"history as a number is the weight of the old value, in (0, 1), not {history}; else 'local' or Sum().")
    return Ema(history)
