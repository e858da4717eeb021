"""What a criterion stands for: a negative log-likelihood, and the cotangents that its curvature is made of.

Notation (`methods.md` B.2 of the design notes): a *term* is one of the rows a criterion averages, f its output
row, l its loss. A matrix of the field is fixed by what is sent backwards from f: the true gradient, a sample, or
the columns of a factor S with S S^T = d^2 l / d f^2. All of them are *per term and unscaled*; `scale` says what the
sum over terms is multiplied by (1 / terms for a mean, 1 for a sum).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from precond.errors import ObservationError


class Likelihood(ABC):
    """A distribution over targets given the model's output, with the reduction its criterion uses.

    Five methods define one: `terms`, `gradient`, `factor`, `sample` and `hessian_product`. All take the criterion's
    own (output, target), in its own layout.
    """

    name: ClassVar[str]
    criterion: ClassVar[type[nn.Module]]

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ObservationError(
                f"reduction={reduction!r} of the criterion is not modelled by the {self.name!r} likelihood: use 'mean' or 'sum'."
            )
        self.reduction = reduction

    @classmethod
    @abstractmethod
    def from_criterion(cls, criterion: nn.Module) -> Likelihood:
        """The likelihood of a criterion; an option that is not modelled is refused by name."""

    @abstractmethod
    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        """The number of terms that a mean divides by, as a 0-dim tensor (no host synchronisation)."""

    @abstractmethod
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """D (sum of the term losses) / d output, in the shape of `output`."""

    @abstractmethod
    def factor(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """The columns of S, one class (event index) at a time, each in the shape of `output`, for all rows at once."""

    @abstractmethod
    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient in `output` of the negative log-likelihood of targets drawn from the model."""

    @abstractmethod
    def hessian_product(self, output: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        """(d^2 sum of the term losses / d output^2) vector; all three have the shape of `output`."""

    @abstractmethod
    def event(self, output: Tensor) -> tuple[int, ...]:
        """The dimensions of `output` that belong to one term (the class dimension)."""

    def scale(self, output: Tensor, target: Tensor) -> Tensor:
        """What the sum over terms is multiplied by in the loss: 1 / terms for a mean, 1 for a sum."""
        if self.reduction == "sum":
            return torch.ones((), dtype=torch.float64, device=output.device)
        return 1.0 / self.terms(output, target).to(torch.float64)


def check_criterion(criterion: nn.Module, modelled: dict[str, object]) -> None:
    """Refuse, by name, an option of the criterion that is not at the value the likelihood models."""
    for option, value in modelled.items():
        given = getattr(criterion, option, value)
        if given is not value and given != value:
            raise ObservationError(
                f"{type(criterion).__name__}({option}={given!r}) is not modelled: its curvature would be silently wrong. "
                f"Use {option}={value!r}, or pass the loss through `preconditioner.observe` with a likelihood of your own."
            )


def full(output: Tensor) -> Tensor:
    """The output in at least float32: probabilities and factors are never formed in half precision."""
    return output.detach().float() if output.dtype in (torch.float16, torch.bfloat16) else output.detach()
