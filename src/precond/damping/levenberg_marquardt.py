"""Damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from precond.damping.base import BLOCK, Damping, Move, State
from precond.damping.formed import Formed
from precond.operators import Operator


@dataclass(frozen=True)
class LevenbergMarquardt(Formed):
    """An amount l that is changed after the optimizer's update d by the ratio of what the loss did to what the model predicted:

        rho = (L(theta + d) - L(theta)) / q(d) ,   q(d) = g^T d + 1/2 d^T M d   (+ l / 2 d^T d)

    l <- l / factor where rho < lower or is not a number, l <- l factor where rho > upper, within [smallest, largest]. Where the loss rose,
    rho is minus infinity. L, g and M are of the batch of the step and of the attached criteria: L(theta + d) is one more forward pass by
    replay, and terms that the optimizer adds (weight decay) are in d only. A step that moved nothing, or whose loss was not finite before
    it, changes nothing. l acts at the next refresh; its state is saved, and the same on all ranks.

    Args:
        value: the first l.
        form: how l is added; see `Formed`.
        factor, lower, upper: 2/3, 1/4 and 3/4 are Martens' rule (Hessian-free, ICML 2010).
        every: adapt at every so many observed steps.
        offset: in [0, every): adapt after the steps offset, offset + every, ..., counted from 1; 0: after `every`, 2 `every`, ...
        include_damping: q has the term in brackets, as in K-FAC. On an exact quadratic rho is 1 only without it.
        curvature: "block": M is made of the operators that the blocks hold; or the name of a matrix that gives products, such as "ggn" or
            "fisher": that of all parameters together, by replay at theta (about 1.6 training steps).

    `kfac` has the settings of Martens and Grosse 2015, section 6.5. Needs a criterion and an optimizer.

    >>> LevenbergMarquardt(1.0).after_step({}, Move(*torch.tensor([3.0, 2.0, -1.5, 1.0, 1.0])))["value"]
    tensor(0.6667, dtype=torch.float64)
    """

    factor: float = 2 / 3
    lower: float = 0.25
    upper: float = 0.75
    every: int = 1
    offset: int = 0
    include_damping: bool = False
    curvature: str = BLOCK
    smallest: float = 1e-12
    largest: float = 1e12

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < 1:
            raise ValueError(
                f"LevenbergMarquardt(factor={self.factor}): what the damping is multiplied by after a good step lies in (0, 1)."
            )
        if not self.lower < self.upper or not 0 <= self.offset < self.every or not 0 <= self.smallest <= self.largest < math.inf:
            raise ValueError(
                f"LevenbergMarquardt needs lower < upper, every >= 1, 0 <= offset < every and 0 <= smallest <= largest, not lower={self.lower}, "
                f"upper={self.upper}, every={self.every}, offset={self.offset}, smallest={self.smallest}, largest={self.largest}."
            )

    @classmethod
    def kfac(cls, value: float = 150.0, *, interval: int = 5) -> Self:
        """Every `interval` steps by (19/20)^interval, with the exact Fisher matrix and the damping in q.

        >>> LevenbergMarquardt.kfac().every
        5
        """
        return cls(value, factor=0.95**interval, every=interval, include_damping=True, curvature="fisher")

    @property
    def model(self) -> str | None:
        return self.curvature

    def asks(self, state: Mapping[str, Any]) -> str | None:
        return self.curvature if (int(state.get("steps", 0)) + 1) % self.every == self.offset else None

    def at(self, step: int = 0, decay: float = 0.0, state: Mapping[str, Any] | None = None) -> Damping:
        value = (state or {}).get("value", self._first(step))
        return self.shaped(value + decay if self.weight_decay else value)

    def _first(self, step: int) -> float | Tensor:
        return self.value(step) if not isinstance(self.value, Tensor) and callable(self.value) else self.value

    def _damp(self, operator: Operator, power: float) -> Operator:
        return self.shaped(self.amount)(operator, power)

    def after_step(self, state: State, move: Move | None) -> State:
        steps = int(state.get("steps", 0)) + 1
        if move is None:
            return state | {"steps": steps}
        old = state.get("value", self._first(0))
        old = torch.as_tensor(old, dtype=torch.float64, device=move.before.device)
        rho = self.ratio(move, old)
        good, bad = rho > self.upper, ~(rho >= self.lower)
        new = torch.where(good, old * self.factor, torch.where(bad, old / self.factor, old)).clamp(self.smallest, self.largest)
        heard = move.before.isfinite() & (move.square != 0)
        # for reading only; a state holds no infinity, which stands for a loss that rose, nor what a broken step left
        return {"steps": steps, "value": torch.where(heard, new, old), "rho": torch.nan_to_num(rho)}

    def ratio(self, move: Move, value: Tensor) -> Tensor:
        """Rho of a move under a damping of this value."""
        model = move.slope + move.curvature / 2
        if self.include_damping:
            model = model + value * move.square / 2
        change = move.after - move.before
        return torch.where(change > 0, -math.inf, torch.where(move.after.isfinite(), change, math.nan) / model)
