"""Kronecker product over the dimensions of a tensor: Shampoo, TNT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Gradient, Observation
from precond.operators import Kronecker, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, mean_gradient, refuse_kind, weighted_gradients, zeros
from precond.statistics import Stat


@REGISTRY.register("kron_dim")
@dataclass(frozen=True, kw_only=True)
class KronDim(Representation):
    """One factor a dimension of each parameter tensor, F_m = (1/N) sum_ik G_(m) G_(m)^T of the mode-m unfoldings.

    normalisation="geometric" (Shampoo): C ~ F_1^(1/k) (x) ... (x) F_k^(1/k), so that the power -1/2 gives the
    published exponent -1/(2k). "trace" (TNT): C ~ F_1 (x) ... (x) F_k / t^(k-1) with t the common trace, exact where C
    is a Kronecker product. A vector has one dense factor. Every parameter tensor is a block of its own.

    Memory sum n_m^2; cost k * prod n * max n a gradient. Sources: Gupta, Koren & Singer 2018; Ren & Goldfarb 2021.

    >>> KronDim(normalisation="trace").normalisation
    'trace'
    """

    scope = "tensor"
    requests = ("gradient", "columns")
    structure = Kronecker

    normalisation: Literal["geometric", "trace"] = "geometric"

    def __post_init__(self) -> None:
        if self.normalisation not in ("geometric", "trace"):
            raise ValueError(f"KronDim(normalisation={self.normalisation!r}): choose 'geometric' or 'trace'.")

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {f"F{m}": Stat("mean", form="matrix") for m in range(len(block.shape))}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if isinstance(observation, Gradient):
            return _contractions(mean_gradient(observation, block).unsqueeze(0), block.shape)
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        total = {f"F{m}": zeros(block, n, n) for m, n in enumerate(block.shape)}
        for gradients in weighted_gradients(observation, block):
            for name, contraction in _contractions(gradients, block.shape).items():
                total[name] = total[name] + contraction
        return total

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        factors = [statistics[f"F{m}"] for m in range(len(block.shape))]
        if self.normalisation == "geometric":
            return Kronecker(*factors, exponent=1.0 / len(factors))
        trace = factors[0].diagonal().sum()
        return Kronecker(*factors, scale=torch.where(trace > 0, trace, torch.ones_like(trace)) ** (1 - len(factors)))

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return sum(n**2 for n in block.shape) * itemsize


def _contractions(gradients: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """F_m of gradients (rows, n): sum over rows of the mode-m unfolding times its transpose."""
    tensors = gradients.reshape(-1, *shape)
    found = {}
    for m, n in enumerate(shape):
        unfolded = tensors.movedim(m + 1, 0).reshape(n, -1)
        found[f"F{m}"] = unfolded @ unfolded.T
    return found
