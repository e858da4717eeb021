"""The contract of a history: how statistics of one step are merged with those before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from precond.errors import InvalidCombination
from precond.numerics import where_valid
from precond.statistics import Stat, Statistics

WEIGHT = ".weight"
"""Suffix of the weight that lies beside an averaged entry."""
COUNT = ".count"
"""Suffix of what some histories count beside an entry."""


class History(ABC):
    """Merges statistics over steps.

    Beside each averaged entry lies its weight, so that entries may start at different times and one that was never updated is well
    defined: it reads as zeros. All state is tensors, and nothing waits for the device.

    A new history writes `_merge` and `_read`, of one entry.
    """

    def supports(self, stat: Stat) -> bool:
        """Whether it can merge such entries."""
        return True

    def merge(self, old: Statistics | None, new: Statistics, spec: Mapping[str, Stat], valid: Tensor | None = None) -> Statistics:
        """The statistics after one more observation; entries not in `new` stay as they are.

        Args:
            old: the result of the last merge, None at first.
            new: one observation, some or all of the entries of `spec`.
            valid: a 0-dim bool tensor; where it is False the observation is as if it had never been. Local entries are replaced all
                the same: a stale one must not survive its step.

        Raises:
            InvalidCombination: an entry is of a kind that this history cannot merge.
            ValueError: an entry is not declared, or has changed its shape.
        """
        result = dict(old or {})
        for name, x in new.items():
            stat = _stat(name, spec)
            if not self.supports(stat):
                raise InvalidCombination(
                    f"{type(self).__name__} history cannot merge {name!r}: rows do not average, unless a rank, an energy or a tolerance bounds their "
                    "number; else use history='local' or Window(m)."
                )
            if stat.kind == "local":
                result[name] = x
            elif stat.kind == "state":
                if name in result and valid is not None:
                    result[name] = torch.where(valid.to(x.device), x, result[name])
                elif valid is None or bool(valid):  # a refresh follows upon the first one, so that the host waits in any case
                    result[name] = x
            else:
                flag = torch.ones((), dtype=torch.bool, device=x.device) if valid is None else valid.to(x.device)
                # what an invalid observation holds may be NaN, which survives a multiplication by zero but not this
                self._merge(result, name, where_valid(flag, x), stat, flag)
        return result

    def read(self, statistics: Statistics, spec: Mapping[str, Stat]) -> Statistics:
        """The averages, without what the history keeps beside them."""
        kept = {name: x for name, x in statistics.items() if name in spec}
        return {name: x if spec[name].kind in ("local", "state") else self._read(statistics, name, spec[name]) for name, x in kept.items()}

    @abstractmethod
    def _merge(self, result: Statistics, name: str, x: Tensor, stat: Stat, valid: Tensor) -> None:
        """Put one entry, and what lies beside it, into `result`; `x` is zero where it is not valid, and may be a view of something else."""

    @abstractmethod
    def _read(self, statistics: Statistics, name: str, stat: Stat) -> Tensor:
        """The average of one entry."""


class Accumulator(History):
    """A history that keeps a running value keep * old + take * x and, by the same rule, its weight keep * weight + take * 1.

    Rows stand for U^T U, and are truncated at each observation so that they do not grow without end.
    """

    def supports(self, stat: Stat) -> bool:
        return stat.kind != "rows" or (stat.truncation is not None and stat.truncation.cuts)

    @abstractmethod
    def _rates(self, result: Statistics, name: str, x: Tensor, valid: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """The factors of the old value and of the new one."""

    def _start(self, x: Tensor, stat: Stat) -> Tensor:
        return torch.zeros_like(x)

    def _merge(self, result: Statistics, name: str, x: Tensor, stat: Stat, valid: Tensor) -> None:
        if name not in result:
            result[name] = x[:0] if stat.kind == "rows" else self._start(x, stat)
            result[name + WEIGHT] = torch.zeros((), dtype=torch.float64, device=x.device)
        value, weight = result[name], result[name + WEIGHT]
        keep, take = self._rates(result, name, x, valid)
        keep = torch.where(valid, torch.as_tensor(keep, dtype=torch.float64, device=x.device), 1.0)
        if stat.kind == "rows":
            result[name] = self._append(name, value, x, stat, keep, torch.as_tensor(take, dtype=torch.float64, device=x.device))
        else:
            check_shape(name, value, x)
            kept = value * keep.to(value.dtype)  # x is zero where it is not valid
            result[name] = kept.add_(x * take.to(x.dtype)) if isinstance(take, Tensor) else kept.add_(x, alpha=take)
        result[name + WEIGHT] = keep * weight + valid * torch.as_tensor(take, dtype=torch.float64, device=x.device)

    def _append(self, name: str, value: Tensor, x: Tensor, stat: Stat, keep: Tensor, take: Tensor) -> Tensor:
        """Rows of keep V^T V + take x^T x, truncated: the best approximation of their number at each step, never above the exact sum."""
        assert stat.truncation is not None
        return stat.truncation.append(value * stat.scale(keep).to(value.dtype), x * stat.scale(take).to(x.dtype))

    def _read(self, statistics: Statistics, name: str, stat: Stat) -> Tensor:
        return average(statistics[name], statistics[name + WEIGHT], stat)


def _stat(name: str, spec: Mapping[str, Stat]) -> Stat:
    if name not in spec:
        raise ValueError(f"the entry {name!r} is not declared; declared are {', '.join(sorted(spec))}.")
    return spec[name]


def check_shape(name: str, old: Tensor, new: Tensor) -> None:
    """Refuse an observation of another shape, which would broadcast."""
    if old.shape != new.shape:
        raise ValueError(f"the entry {name!r} changed its shape from {tuple(old.shape)} to {tuple(new.shape)}: start a new history.")


def divide(value: Tensor, weight: Tensor) -> Tensor:
    """The ratio, and zeros where there is no weight yet."""
    return value / torch.where(weight > 0, weight, 1.0).to(value.dtype)


def average(value: Tensor, weight: Tensor, stat: Stat) -> Tensor:
    """What stands for C / weight where `value` stands for C."""
    return divide(value, stat.scale(weight) if stat.kind == "rows" else weight)
