"""`nn.Embedding`: a Linear layer on one-hot rows, whose weight is stored input first; `nn.EmbeddingBag`: on their sum, mean or maximum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from precond.bags import entries
from precond.layers.base import OneHot, Rule, arrange, layer_grad, output_grad, wide
from precond.layers.registration import register
from precond.observe import LayerColumns, Tensors


def _refused(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True divides the gradient by counts of the batch, which no curvature models"
    if module.sparse:
        return "sparse=True gives sparse gradients: use sparse=False"
    if module.max_norm is not None:
        return "max_norm rewrites the weight inside the forward pass"
    return None


@register(nn.Embedding)
class Embedding(Rule):
    """Rows of `padding_idx` receive no gradient and count nowhere."""

    linear = True
    input_first = True
    one_hot = True

    def inputs(self, seen: LayerColumns) -> OneHot:
        module, index = seen.module, arrange(seen.input, seen)
        assert isinstance(module, nn.Embedding)
        index = index.reshape(index.shape[0] if index.dim() else 1, -1)
        mask = torch.ones_like(index, dtype=torch.bool) if module.padding_idx is None else index != module.padding_idx
        return OneHot(index, module.num_embeddings, mask)

    def outputs(self, seen: LayerColumns) -> Tensor:
        g, hot = layer_grad(seen), self.inputs(seen)
        return g.reshape(g.shape[0], 1, *hot.index.shape, -1) * hot.mask[..., None]

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        hot = self.inputs(seen)
        return {"weight": _scatter(hot.index[examples], self.outputs(seen)[:, 0, examples], hot.size)}

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        hot, g = self.inputs(seen), self.outputs(seen)
        table = g.new_zeros(hot.size, g.shape[-1])
        return {"weight": table.index_add_(0, hot.index.reshape(-1), g.sum((0, 1)).reshape(-1, g.shape[-1]))}

    def refuse(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        return _refused(module)


def _scatter(index: Tensor, g: Tensor, size: int) -> Tensor:
    """Indices (n, R) and rows (K, n, R, width) -> tables (K, n, size, width): row v is the sum of the rows whose index is v."""
    columns, count, _, width = g.shape
    # one scatter into (K * n) tables stacked on top of each other
    offset = torch.arange(columns * count, device=index.device).view(columns, count, 1) * size
    table = g.new_zeros(columns * count * size, width)
    table.index_add_(0, (offset + index).reshape(-1), g.reshape(-1, width))
    return table.view(columns, count, size, width)


@register(nn.EmbeddingBag)
class EmbeddingBag(Rule):
    """Row v of example i has the sum over entries v of its bags of c g, c = 1, 1 / entries of the bag, or the entry's weight.

    Of a maximum each coordinate belongs to its largest entry. A bag is no unit vector and has no diagonal factor, so that `kron_io`
    takes its fallback. Entries of `padding_idx` are in no bag.
    """

    def leading(self, seen: LayerColumns) -> int:
        return output_grad(seen).shape[1]

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        module, g = seen.module, output_grad(seen)
        assert isinstance(module, nn.EmbeddingBag)
        start, stop, _ = examples.indices(seen.batch)
        index, owner, share = _entries(module, seen, g)
        example = owner // (g.shape[1] // seen.batch)
        chosen = (example >= start) & (example < stop)
        index, owner, share, example = index[chosen], owner[chosen], share[chosen], example[chosen] - start
        tables = g.new_zeros(g.shape[0], stop - start, module.num_embeddings, g.shape[2])
        tables.flatten(1, 2).index_add_(1, example * module.num_embeddings + index, g[:, owner] * share)
        return {"weight": tables}

    def refuse(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.EmbeddingBag)
        return _refused(module)


def _entries(module: nn.EmbeddingBag, seen: LayerColumns, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one call, see `precond.bags.entries`; shares in the dtype of g."""
    given: dict[str, Any] = dict(zip(("input", "offsets", "per_sample_weights"), seen.args, strict=False)) | dict(seen.kwargs)
    weights = given.get("per_sample_weights")
    index, owner, share = entries(
        wide(module.weight.detach()), given["input"], given.get("offsets"), None if weights is None else wide(weights),
        mode=module.mode, padding_idx=module.padding_idx, last_offset=module.include_last_offset, bags=g.shape[1],
    )  # fmt: skip
    return index, owner, share.to(g.dtype)
