"""A model that computes its own loss: what an attached criterion would have been called with, read from the model's call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class OwnLoss:
    """loss = factor * criterion(output, target), where `output` was made from the model's output, with its graph.

    factor: 0-dim, a weight that the model itself put on its mean loss (rule 1), as n / num_items of a batch in parts.
    """

    loss: Tensor
    criterion: nn.Module
    output: Tensor
    target: Tensor
    factor: Tensor | None = None


class LossReader(ABC):
    """Stands where a criterion does: `attach(model, reader, optimizer)`.

    It is asked at the end of every observed forward pass, when the record of the pass is closed.
    """

    @abstractmethod
    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> OwnLoss | None:
        """The loss of this call of the model; None where it computed none."""

    def rows(self, model: nn.Module) -> Mapping[str, str]:
        """Layouts, by module name, of layers that the user's own `rows=` says nothing of."""
        return {}
