"""Updates that are taken back, wholly or in part, where the loss did not fall enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from precond.transforms.base import Transform


@dataclass(frozen=True)
class Search(Transform):
    """A decision about the update that the optimizer has made; needs `optimizer.step(closure)`.

    The closure is run again, with the randomness of its first run; gradients and buffers are put back after it. The loss is the mean over ranks,
    so that all of them decide alike. What the optimizer keeps (momentum) is not taken back.
    """

    @property
    def searches(self) -> bool:
        return True


@dataclass(frozen=True)
class Reject(Search):
    """Take the whole update back where the loss of the batch rose by more than `tolerance`, or is not a number. Cost: one run of the closure.

    >>> Reject().fraction(1.0, -0.5, lambda t: 1.2)
    0.0
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"Reject(tolerance={self.tolerance}): by how much the loss may rise is at least 0.")

    def fraction(self, loss: float, slope: float, evaluate: Callable[[float], float]) -> float:
        return 1.0 if evaluate(1.0) <= loss + self.tolerance else 0.0


@dataclass(frozen=True)
class Backtrack(Search):
    """The largest t in 1, shrink, shrink^2, ... with L(theta + t d) <= L(theta) + decrease t min(g^T d, 0) (Armijo); 0 where none is found.

    d is the optimizer's update with its learning rate, g the raw gradient. Hessian-free has decrease=1e-2, shrink=0.8 and 60 reductions (Martens
    2010, released code); Newton-CG 1e-4 and 0.5 (Nocedal and Wright, chapter 3). Cost: a run of the closure a trial.

    >>> Backtrack().fraction(1.0, -2.0, lambda t: (1 - 2 * t) ** 2 + t)
    0.5
    """

    decrease: float = 1e-4
    shrink: float = 0.5
    reductions: int = 20

    def __post_init__(self) -> None:
        if not (0 <= self.decrease < 1 and 0 < self.shrink < 1 and self.reductions >= 0):
            raise ValueError(
                f"Backtrack needs decrease in [0, 1), shrink in (0, 1) and reductions >= 0, not {self.decrease}, {self.shrink} and {self.reductions}."
            )

    def fraction(self, loss: float, slope: float, evaluate: Callable[[float], float]) -> float:
        t = 1.0
        for _ in range(self.reductions + 1):
            if evaluate(t) <= loss + self.decrease * t * min(slope, 0.0):
                return t
            t *= self.shrink
        return 0.0
