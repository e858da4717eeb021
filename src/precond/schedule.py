"""When something is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Due every so many steps, or when a function of the step says so.

    Args:
        every: a positive int: due at steps 0, every, 2 every, ...; or a function of the step.

    >>> [step for step in range(7) if Schedule(3).due(step)]
    [0, 3, 6]
    """

    every: int | Callable[[int], bool]

    def __post_init__(self) -> None:
        if callable(self.every):
            return
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            raise TypeError(f"an interval is a number of steps, or a function that says whether a step is due, not {self.every!r}.")
        if self.every < 1:
            raise ValueError(f"an interval is at least 1 step, not {self.every}: for never, give a function such as lambda step: False.")

    def due(self, step: int) -> bool:
        """Whether it is due at a step; the first step is 0."""
        return bool(self.every(step)) if callable(self.every) else step % self.every == 0


def resolve(schedule: int | Callable[[int], bool] | Schedule) -> Schedule:
    """A `Schedule`, from one or from what makes one."""
    return schedule if isinstance(schedule, Schedule) else Schedule(schedule)
