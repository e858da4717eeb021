"""The contract of a damping, and what a number given as damping becomes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from precond.errors import UsageError
from precond.operators import BlockDiagonal, Dense, Diagonal, Operator, Repeated, Shifted, SparsePrecision

SMALLEST = 1e-8
"""Where there is no damping, the first boost starts at this multiple of the mean of the diagonal."""

State = dict[str, Any]
"""What a damping that adapts keeps from step to step: tensors and numbers."""


@runtime_checkable
class ValueSchedule(Protocol):
    """The amount of damping as a function of the step."""

    def __call__(self, step: int, /) -> float: ...


Amount = float | Tensor | ValueSchedule

BLOCK = "block"
"""The quadratic model whose matrix is what the blocks hold."""


@dataclass(frozen=True)
class Move:
    """What an update did to the batch of its step: numbers (0-dim), the same on all ranks.

    before, after: the loss. slope: g^T d, of the gradient and the displacement d of all parameters. curvature: d^T M d.
    square: d^T d.
    """

    before: Tensor
    after: Tensor
    slope: Tensor
    curvature: Tensor
    square: Tensor


@dataclass(frozen=True)
class Damping(ABC):
    """A rule that makes an operator safe to invert.

    Args:
        value: at least 0 and finite: a number, a 0-dim tensor where it changes from step to step, or a function of the step.
        weight_decay: the optimizer's weight decay is added to the value: C is then that of the loss with weight_decay / 2 |theta|^2,
            whose gradient the optimizer adds by itself, after the preconditioner.

    A new rule writes `_damp`, and `boosted` where `value` is not what a failing refresh should raise.

    Raises:
        ValueError: the value is negative or not finite.
    """

    value: Amount
    weight_decay: bool = field(default=False, kw_only=True, repr=False)
    kinds: ClassVar[dict[str, type[Damping]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Damping.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        value = self.value
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(f"damping is a number or a 0-dim tensor, not a tensor of shape {tuple(value.shape)}.")
            if value.device.type != "cpu":
                return  # reading it would stop the host on every step
        elif callable(value):
            return
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"damping must be finite and at least 0, not {float(value)}: give a small positive number such as 1e-3.")

    # --- the operator

    def __call__(self, operator: Operator, power: float = 1.0) -> Operator:
        """The damped operator; `power` is that of the solver, which takes its inverse to this power."""
        if isinstance(operator, BlockDiagonal):
            return operator.with_blocks({name: self(block, power) for name, block in operator.blocks.items()})
        if isinstance(operator, Repeated):
            return operator.with_operator(self(operator.operator, power))
        return self._damp(operator, power)

    @abstractmethod
    def _damp(self, operator: Operator, power: float) -> Operator:
        """The damped operator of one that is not block-diagonal."""

    @property
    def keeps_eigenvectors(self) -> bool:
        """Whether the damped operator has the eigenvectors of the operator, so that a solver that has them may damp the spectrum alone."""
        return False

    @property
    def amount(self) -> float | Tensor:
        """The value, where it is that of a step."""
        if isinstance(self.value, Tensor) or not callable(self.value):
            return self.value
        raise UsageError(f"the value of {type(self).__name__} is a function of the step: take it at one with damping.at(step).")

    @property
    def absent(self) -> bool:
        """Whether it is known, without waiting for a device, that nothing is added."""
        return not isinstance(self.amount, Tensor) and self.amount == 0

    # --- over steps

    def at(self, step: int = 0, decay: float = 0.0, state: Mapping[str, Any] | None = None) -> Damping:
        """The rule of one step: its value is a number. decay: the optimizer's weight decay. state: what the rule keeps, if it keeps any."""
        value = self.value
        if not isinstance(value, Tensor) and callable(value):
            value = value(step)
        if self.weight_decay:
            value = value + decay
        return self if value is self.value else replace(self, value=value, weight_decay=False)

    def boosted(self, factor: float, operator: Operator) -> Self:
        """More of the same, for a refresh that failed: `factor` times the value, and 1e-8 times the mean diagonal where the value is 0."""
        if bool(self.amount == 0):
            return replace(self, value=SMALLEST * _mean_diagonal(operator))
        return replace(self, value=self.amount * factor)

    @property
    def model(self) -> str | None:
        """The quadratic model of the loss that it compares with what the optimizer's update did: `BLOCK`, or the name of a matrix.

        None where it does not follow the loss.
        """
        return None

    def asks(self, state: Mapping[str, Any]) -> str | None:
        """The model, where it wants to hear of the present step, the first observed one after those in its state."""
        return self.model

    def after_step(self, state: State, move: Move | None) -> State:
        """The new state after an observed step; `move` is None where the rule did not ask for it."""
        return state

    # --- in a cell

    def plain(self) -> Amount | Damping:
        """The same amount for another cell, whose natural form it takes there."""
        return self.value

    def resolved(self, natural: type[Damping]) -> Damping:
        """With what it leaves to the cell filled in."""
        return self


def plus(operator: Operator, shift: Tensor | float) -> Operator:
    """The operator with a multiple of the identity added, in its own structure where that can hold it; shift: a number, or one a matrix."""
    if isinstance(operator, BlockDiagonal):
        return operator.with_blocks({name: plus(block, shift) for name, block in operator.blocks.items()})
    if isinstance(operator, Repeated):
        return operator.with_operator(plus(operator.operator, shift))
    return operator.plus(shift) if isinstance(operator, (Dense, Diagonal, SparsePrecision)) else Shifted(operator, shift)


def _mean_diagonal(operator: Operator) -> Tensor:
    """Of a matrix-free operator, only the mean over one fixed direction: its diagonal would cost n products."""
    if operator.live:
        ones = torch.ones(operator.n, dtype=operator.dtype, device=operator.device)
        return operator.quadratic_form(ones).abs() / operator.n
    return operator.trace().abs() / operator.n
