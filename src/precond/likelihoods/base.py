"""What a criterion stands for: a negative log-likelihood, and the cotangents that its curvature is made of.

Notation (`methods.md` B.2 of the design notes): a *term* is one of the rows a criterion averages, f its output
row, l its loss. A matrix of the field is fixed by what is sent backwards from f: the true gradient, a sample, or
the columns of a factor S with S S^T = d^2 l / d f^2. All of them are *per term and unscaled*; `scale` says what the
sum over terms is multiplied by (1 / terms for a mean, 1 for a sum). A weight of a term (of its class, of its target,
of its place in the user's own mean) is part of l: it enters the gradient once and S and the samples by its root.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from precond.errors import ObservationError


class Likelihood(ABC):
    """A distribution over targets given the model's output, with the reduction its criterion uses.

    Five methods define one: `terms`, `gradient`, `factor`, `sample` and `hessian_product`. All take the criterion's
    own (output, target), in its own layout. `modelled` names the options of the criterion that must have one value;
    `event` says which dimensions of the output belong to one term.

    natural: the output is the natural parameter, so that d^2 l / d f^2 depends on no target and is the Fisher matrix.
    Where it is not, `factor` and `hessian_product` are those of the Fisher matrix, and the matrix 'ggn' is refused.
    """

    name: ClassVar[str]
    criterion: ClassVar[type[nn.Module] | None] = None
    modelled: ClassVar[Mapping[str, object]] = {}
    natural: bool = True

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ObservationError(f"reduction={reduction!r} is not modelled by the {self.name!r} likelihood: use 'mean', 'sum' or 'none'.")
        self.reduction = reduction

    @classmethod
    def from_criterion(cls, criterion: nn.Module) -> Likelihood:
        """The likelihood of a criterion as its options are now; one that is not modelled is refused by name."""
        check_criterion(criterion, cls.modelled)
        return cls(getattr(criterion, "reduction", "mean"))

    def given(self, output: Tensor, *arguments: Any) -> tuple[Likelihood, Tensor]:
        """The likelihood and the output it sees where the criterion was called with more than (output, target)."""
        if arguments:
            raise ObservationError(
                f"the {self.name!r} likelihood models criterion(output, target), not further arguments of the criterion."
            )
        return self, output

    @abstractmethod
    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        """What each term adds to the number that a mean divides by: 1, or 0 where ignored, or the weight of its class.

        In the shape of `output` with the dimensions of `event` of size 1. No host synchronisation.
        """

    @abstractmethod
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """D (sum of the term losses) / d output, in the shape of `output`."""

    @abstractmethod
    def factor(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """The columns of S, one class (event index) at a time, each in the shape of `output`, for all rows at once."""

    @abstractmethod
    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient in `output` of -log p at targets drawn from the model, times the root of the term's weight."""

    @abstractmethod
    def hessian_product(self, output: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        """S S^T vector, which is (d^2 sum of the term losses / d output^2) vector; all three have the shape of `output`."""

    def event(self, output: Tensor) -> tuple[int, ...]:
        """The dimensions of `output` that belong to one term; the last one, unless the output is a row of terms."""
        return (output.dim() - 1,) if output.dim() > 1 else ()

    def spread(self, output: Tensor, entries: Tensor) -> Tensor:
        """Numbers in the shape of the unreduced loss, laid out so that they broadcast against `output`."""
        if entries.shape == output.shape:
            return entries
        for dim in self.event(output):
            entries = entries.unsqueeze(dim)
        return entries

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The number that a mean divides by, as a 0-dim tensor."""
        return self.terms(output, target).sum().to(torch.float64)

    def scale(self, output: Tensor, target: Tensor) -> Tensor:
        """What the sum over terms is multiplied by in the loss: 1 / total for a mean, 1 for a sum."""
        if self.reduction == "sum":
            return torch.ones((), dtype=torch.float64, device=output.device)
        return 1.0 / self.total(output, target)

    def loss(self, criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        """The criterion's value on (output, target) once more, with its graph."""
        found: Tensor = criterion.forward(output, target)
        return found


def check_criterion(criterion: nn.Module, modelled: Mapping[str, object]) -> None:
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
