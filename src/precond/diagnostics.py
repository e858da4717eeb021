"""Counters of what went wrong and what was done about it; kept on the device until they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from precond.events import MESSAGES, Events

COUNTERS = (
    "steps", "observations", "observations_dropped", "refreshes", "retries_float64", "retries_damping", "retries_cpu", "blocks_kept",
    "directions_zeroed", "solves_failed", "steps_skipped",
    "steps_shortened", "steps_rejected",
)  # fmt: skip


class Diagnostics(Mapping[str, int]):
    """A mapping from counter to number. Reading a counter waits for the device; counting does not.

    >>> Diagnostics()["steps"]
    0
    """

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._tensors: dict[str, Tensor] = {}
        self.events = Events()

    def count(self, name: str, number: int | Tensor = 1, block: str | None = None) -> None:
        """Add to a counter; a 0-dim (bool) tensor is added on its device. block: of which it may be told on the logging channel."""
        if block is not None and name in MESSAGES:
            self.events.tell(name, block, self._numbers["steps"], number)
        if isinstance(number, Tensor):
            old = self._tensors.get(name)
            number = number.to(torch.int64)
            self._tensors[name] = number if old is None else old.to(number.device) + number
        else:
            self._numbers[name] += number

    def __getitem__(self, name: str) -> int:
        if name not in COUNTERS:
            raise KeyError(name)
        return self._numbers[name] + int(self._tensors.get(name, 0))

    def __iter__(self) -> Iterator[str]:
        return iter(COUNTERS)

    def __len__(self) -> int:
        return len(COUNTERS)

    def __repr__(self) -> str:
        return repr(dict(self))

    def load(self, counters: Mapping[str, int]) -> None:
        """Start from saved numbers."""
        self._tensors.clear()
        self._numbers = Counter(counters)
