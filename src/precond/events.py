"""The logging channel "precond": a line where the ladder was climbed or something was left out, and not the same one at every step."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

LOGGER = logging.getLogger("precond")
EVERY = 100
"""Steps before the same thing is said again of a block."""

MESSAGES: dict[str, tuple[int, str]] = {
    "retries_float64": (logging.INFO, "was refreshed in float64: its matrix is badly conditioned"),
    "retries_damping": (logging.INFO, "was refreshed with more damping than asked for: raise it if this goes on"),
    "retries_cpu": (logging.INFO, "was refreshed on the CPU: the device's own linear algebra failed"),
    "blocks_kept": (logging.WARNING, "could not be refreshed and keeps its last good state: raise the damping or lower the learning rate"),
    "observations_dropped": (logging.WARNING, "saw statistics that are not finite, or no term at all: the observation is dropped"),
    "directions_zeroed": (logging.WARNING, "has a gradient or direction that is not finite: it does not move in this step"),
    "solves_failed": (logging.WARNING, "could not solve for its direction: it does not move in this step"),
    "steps_skipped": (logging.WARNING, "has a gradient or direction that is not finite: the whole step is skipped"),
}


class Events:
    """Says each thing of each block at most once in `EVERY` steps. quiet: says nothing, as on all ranks but the first.

    A flag on a device is not waited for: it is read by `flush`, where the host waits anyway.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._said: dict[tuple[str, str], int] = {}
        self._waiting: dict[tuple[str, str], tuple[int, Tensor]] = {}

    def tell(self, name: str, block: str, step: int, number: int | Tensor) -> None:
        """Something was counted for a block at a step; number: how often, a flag where only the device knows."""
        level, _ = MESSAGES[name]
        key = (name, block)
        if self.quiet or not LOGGER.isEnabledFor(level) or (key in self._said and step < self._said[key] + EVERY):
            return
        if isinstance(number, Tensor) and number.device.type != "cpu":
            if key in self._waiting:
                step, number = self._waiting[key][0], torch.maximum(number.to(torch.int64), self._waiting[key][1])
            self._waiting[key] = (step, number.to(torch.int64))
        elif bool(number):
            self._say(key, step)

    def flush(self) -> None:
        """Say what flags on a device have to say."""
        waiting, self._waiting = self._waiting, {}
        for key, (step, flag) in waiting.items():
            if bool(flag):
                self._say(key, step)

    def _say(self, key: tuple[str, str], step: int) -> None:
        self._said[key] = step
        level, text = MESSAGES[key[0]]
        LOGGER.log(level, "step %d: block %r %s (%s; not said again for %d steps).", step, key[1], text, key[0], EVERY)
