"""`nn.Embedding`: a Linear layer on one-hot rows, whose weight is stored input first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from precond.layers.base import OneHot, Rule, arrange, layer_grad, rule_for
from precond.observe import LayerColumns, Tensors


@rule_for(nn.Embedding)
class Embedding(Rule):
    """Rows of `padding_idx` receive no gradient and count nowhere."""

    linear = True

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
        rows = self.rows(seen)
        assert isinstance(rows.a, OneHot)
        index, g = rows.a.index[examples], rows.g[:, 0, examples]
        columns, count, _, width = g.shape
        # one scatter into (K * n) tables stacked on top of each other
        offset = torch.arange(columns * count, device=index.device).view(columns, count, 1) * rows.a.size
        table = g.new_zeros(columns * count * rows.a.size, width)
        table.index_add_(0, (offset + index).reshape(-1), g.reshape(-1, width))
        return {"weight": table.view(columns, count, rows.a.size, width)}

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        rows = self.rows(seen)
        assert isinstance(rows.a, OneHot)
        width = rows.g.shape[-1]
        table = rows.g.new_zeros(rows.a.size, width)
        return {"weight": table.index_add_(0, rows.a.index.reshape(-1), rows.g.sum((0, 1)).reshape(-1, width))}

    def refuse(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True divides the gradient by counts of the batch, which no curvature models"
        if module.sparse:
            return "sparse=True gives sparse gradients: use sparse=False"
        if module.max_norm is not None:
            return "max_norm rewrites the weight inside the forward pass"
        return None
