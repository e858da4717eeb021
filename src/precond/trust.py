"""What the optimizer's update did to the loss of its batch, and what a quadratic model said that it would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.assembly import Assembly
from precond.blockstate import BlockState
from precond.damping import BLOCK, Move
from precond.errors import InvalidCombination
from precond.matrices import REGISTRY as MATRICES
from precond.observe import Tensors
from precond.operators import Operator
from precond.plan import Plan


@dataclass(frozen=True)
class Origin:
    """All trainable parameters before the update, and the gradient of the step's criterion calls there."""

    parameters: Tensors
    slope: Tensors

    @classmethod
    def of(cls, assembly: Assembly, check: bool) -> Origin:
        """check: compare the gradient with that of a replay."""
        tensors = assembly.plan.partition.tensors
        return cls({n: p.detach().clone() for n, p in tensors.items()}, assembly.slope(tensors, check))


def check(plan: Plan) -> None:
    """Refuse the name of a matrix that has no products."""
    for name in {model for block in plan.blocks if (model := block.damping.model) is not None and model != BLOCK}:
        matrix = MATRICES.create(name)
        if "product" not in matrix.supplies:
            raise InvalidCombination(
                f"LevenbergMarquardt(curvature={name!r}): that matrix gives no products; choose {BLOCK!r}, or a matrix such as 'ggn' that does."
            )


class Outcome:
    """The update of one step, heard after it; what costs a pass is computed once."""

    def __init__(self, assembly: Assembly, blocks: Sequence[BlockState], origin: Origin) -> None:
        self._assembly, self._blocks, self._origin = assembly, blocks, origin
        tensors = assembly.plan.partition.tensors
        self._steps = {n: _wide(p.detach()) - _wide(origin.parameters[n]) for n, p in tensors.items()}
        self._losses: tuple[Tensor, Tensor] | None = None
        self._moves: dict[str, Move] = {}

    def move(self, curvature: str) -> Move:
        """curvature: "block", or the name of a matrix."""
        if curvature not in self._moves:
            self._losses = self._losses or self._assembly.losses()
            model = self._held() if curvature == BLOCK else self._exact(curvature)
            mine = [_inner(self._origin.slope, self._steps), model, _inner(self._steps, self._steps)]
            size = self._assembly.group.size  # equal up to the rounding of the devices, and from here on to the last bit
            self._moves[curvature] = Move(*self._losses, *self._assembly.group.sum([value / size for value in mine]))
        return self._moves[curvature]

    def _exact(self, name: str) -> Tensor:
        vectors = {n: v.to(self._origin.parameters[n].dtype).unsqueeze(0) for n, v in self._steps.items()}
        number = len(self._assembly.plan.demands)  # no demand's: labels that it draws are its own
        product = self._assembly.product(MATRICES.create(name), number, self._leaves(list(vectors)), elsewhere=True)
        return _inner(vectors, product(vectors))

    def _held(self) -> Tensor:
        """d^T M d, M block-diagonal of what the blocks hold; blocks that hold nothing yet count as 0."""
        total = torch.zeros((), dtype=torch.float64, device=next(iter(self._steps.values())).device)
        for block in self._blocks:
            replayed = block.plan.repr.live and block.plan.kind == "product"  # the graph of its products was made before the update
            if replayed or block.measured():
                operator = self._again(block) if replayed else block.live or block.operator()
                vector = block.plan.block.gather(self._steps)
                total = total + operator.quadratic_form(vector.to(operator.dtype)).to(total)
        return total

    def _again(self, block: BlockState) -> Operator:
        plan, number = block.plan, block.plan.demand
        product = self._assembly.product(plan.matrix, number, self._leaves(self._assembly.names(number)), elsewhere=True)
        return plan.matrix.finish(plan.repr.operator(plan.repr.measure("all", product, plan.block, {}), plan.block))

    def _leaves(self, names: Sequence[str]) -> Tensors:
        return {n: self._origin.parameters[n].clone().requires_grad_() for n in names}


def _inner(u: Tensors, v: Tensors) -> Tensor:
    return torch.stack([(u[n].to(torch.float64) * v[n].to(torch.float64)).sum() for n in v]).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
