"""What a preconditioner carries from step to step beside its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from precond.diagnostics import Diagnostics


@dataclass
class Progress:
    """The number of steps taken, the seed of all draws, the counters, and the state of each transform."""

    seed: int
    transforms: list[dict[str, Any]]
    step: int = 0
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
