"""Operations that torch cannot differentiate twice, or does so wrongly, as others that it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from precond.bags import entries


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The weight g v / |v|, the norm over all dimensions but `dim`. The fused kernel's second derivative is not symmetric in torch 2.13 on the CPU."""
    norm: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """The rows of each bag times their shares, summed; options that the layer rule refuses change nothing of a value."""
    bags = len(input) if offsets is None else len(offsets) - include_last_offset
    index, bag, share = entries(
        weight, input, offsets, per_sample_weights, mode=mode, padding_idx=padding_idx, last_offset=include_last_offset, bags=bags
    )
    return weight.new_zeros(bags, weight.shape[1]).index_add(0, bag, share * weight[index])


_INSTEAD: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch._weight_norm: weight_norm,
    torch.nn.functional.embedding_bag: embedding_bag,
}


class TwiceDifferentiable(TorchFunctionMode):
    """Inside, calls of such operations are computed by what has the same value and a second derivative.

    >>> v, g = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.ones(1, 1)
    >>> with TwiceDifferentiable():
    ...     torch._weight_norm(v, g, 0).detach()
    tensor([[0.6000, 0.8000]])
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call: Callable[..., Any] = _INSTEAD.get(func, func)
        return call(*args, **(kwargs or {}))
