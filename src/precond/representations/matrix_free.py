"""Products only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Gradient, Kind, Observation, Product
from precond.operators import MatrixFree as MatrixFreeOperator
from precond.operators import Operator
from precond.representations.base import REGISTRY, Representation, Statistics, mean_gradient, refuse_kind, weighted_gradients, zeros
from precond.statistics import Stat


@REGISTRY.register("matrix_free")
@dataclass(frozen=True, kw_only=True)
class MatrixFree(Representation):
    """v -> C v over all parameters, never formed. Lives one step: nothing is averaged over steps.

    Memory: the graph of one replayed forward pass a micro-batch. A product costs about 1.6 training steps and is
    all-reduced where there are several ranks.

    Args:
        diagonal: the name of a matrix of columns, whose diagonal is measured beside the products, for a solver that preconditions with it:
            Martens' Hessian-free takes "empirical_fisher" with CG(preconditioner="jacobi"). Costs the per-example gradients of the step.

    >>> MatrixFree().live
    True
    """

    scope = "model"
    requests = ("product", "gradient")
    structure = MatrixFreeOperator

    diagonal: str | None = None

    @property
    def stages(self) -> tuple[str, ...]:  # type: ignore[override]  # as many as it is told to measure
        return ("all",) if self.diagonal is None else ("all", "diagonal")

    @property
    def beside(self) -> Mapping[str, tuple[str, Kind]]:
        return {} if self.diagonal is None else {"diagonal": (self.diagonal, "columns")}

    def centring(self) -> Mapping[str, Stat]:
        return {}  # products come centred

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {"product": Stat("local")} | ({} if self.diagonal is None else {"diagonal": Stat("mean", form="diagonal")})

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if stage == "diagonal" and isinstance(observation, Columns):
            rows = [u.square().sum(0) for u in weighted_gradients(observation, block)]
            return {"diagonal": sum(rows[1:], rows[0]) if rows else zeros(block, block.n)}
        if isinstance(observation, Product):
            return {"product": _flat(observation, block)}
        if isinstance(observation, Gradient):
            gradient = mean_gradient(observation, block)
            return {"product": lambda v: gradient * (gradient @ v)}
        raise refuse_kind(self, observation)

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        like = zeros(block, 0)
        return MatrixFreeOperator(statistics["product"], block.n, like.dtype, like.device, statistics.get("diagonal"))


def _flat(product: Product, block: Block) -> Callable[[Tensor], Tensor]:
    def apply(v: Tensor) -> Tensor:
        return block.gather(product(block.scatter(v.unsqueeze(0))), lead=1).squeeze(0)

    return apply
