"""The diagonal, on the parameters that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.blocks import Block
from precond.errors import InvalidCombination
from precond.observe import Kind
from precond.operators import Diagonal as DiagonalOperator
from precond.operators import Operator
from precond.representations.base import REGISTRY, Representation, Statistics
from precond.representations.diagonal import Diagonal
from precond.statistics import Stat


@REGISTRY.register("diagonal_sparse")
@dataclass(frozen=True, kw_only=True)
class DiagonalSparse(Diagonal):
    """diag(C) on the kept coordinates and zero on the others, which are left with the damping alone: 1 / damping times their gradient.

    For sparse training, where the gradient or the update of a pruned weight is masked, and with it whatever the damping makes of it. The
    average goes on for every coordinate, so that a weight that grows back has its own.

    mask: by parameter name a tensor of its shape, nonzero where it is kept; a parameter that is not named is kept whole. None: a tensor of
    two or more dimensions keeps its nonzero entries at each observation, and all of them as long as it has none (it is new, not pruned);
    vectors are kept whole. Memory P and a flag each; otherwise as `diagonal`. Source: the masked gradients of M-FAC, Frantar, Kurtic &
    Alistarh 2021.

    Raises:
        InvalidCombination: a mask is not of its parameter's shape.

    >>> import torch, precond
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> repr = DiagonalSparse(mask={"weight": torch.tensor([[1, 0]])})
    >>> precond.curvature(model, torch.nn.MSELoss(), torch.eye(2), torch.zeros(2, 1), matrix="ggn", repr=repr).diagonal().round()
    tensor([1., 0.])
    """

    followed = ()

    mask: Mapping[str, Tensor] | None = None

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]
        return ("columns", "gradient", "product") if self.estimator == "exact" else ("pairs",)

    def over(self, kind: Kind) -> Representation:
        return self

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        (parameter,) = block.parameters
        given = (self.mask or {}).get(parameter.name)
        if given is not None and tuple(given.shape) != parameter.shape:
            raise InvalidCombination(
                f"the mask of {parameter.name!r} has the shape {tuple(given.shape)}, and the parameter {parameter.shape}: give it that."
            )
        return {**super().statistics(block), "kept": Stat("state")}

    def prepare(self, stage: str, statistics: Statistics, averages: Callable[[], Statistics], block: Block) -> Statistics:
        return statistics | {"kept": self._kept(block)}

    def _kept(self, block: Block) -> Tensor:
        parameter = block.parameters[0]
        layer, local = parameter.uses[0]
        values = block.layers[layer].tensor(local).detach()
        if self.mask is None:
            nonzero = values != 0
            kept = nonzero | ~nonzero.any() if values.dim() > 1 else torch.ones_like(nonzero)
        elif parameter.name in self.mask:
            kept = self.mask[parameter.name].to(values.device) != 0
        else:
            kept = torch.ones_like(values, dtype=torch.bool)
        return kept.flatten()

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        whole = super().operator(statistics, block)
        return DiagonalOperator(torch.where(statistics["kept"], whole.diagonal(), 0.0))
