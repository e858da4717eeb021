"""`nn.Linear` with any number of leading dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from precond.layers.base import Rule, layer_grad, layer_input, rule_for
from precond.observe import LayerColumns, Tensors


class LinearRule(Rule):
    """Rows of (a, g) in, gradients out; shared by every layer that has the normal form."""

    joint = True
    linear = True

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        rows = self.rows(seen)
        assert isinstance(rows.a, Tensor)
        a, g = rows.a[:, examples], rows.g[:, :, examples]
        out: Tensors = {}
        if "weight" in names:
            weight = torch.einsum("kgnro,gnri->kngoi", g, a)
            out["weight"] = weight.reshape(*weight.shape[:2], *seen.module.get_parameter("weight").shape)
        if "bias" in names:
            out["bias"] = torch.einsum("kgnro->kngo", g).flatten(2)
        return out

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        rows = self.rows(seen)
        assert isinstance(rows.a, Tensor)
        out: Tensors = {}
        if "weight" in names:
            weight = torch.einsum("kgnro,gnri->goi", rows.g, rows.a)
            out["weight"] = weight.reshape(seen.module.get_parameter("weight").shape)
        if "bias" in names:
            out["bias"] = torch.einsum("kgnro->go", rows.g).flatten()
        return out


@rule_for(nn.Linear)
class Linear(LinearRule):
    """s = W a + b: the input is (N, *, in), the positions between are shared."""

    def inputs(self, seen: LayerColumns) -> Tensor:
        a = layer_input(seen)
        return a.reshape(1, a.shape[0] if a.dim() > 1 else 1, -1, a.shape[-1])

    def outputs(self, seen: LayerColumns) -> Tensor:
        g = layer_grad(seen)
        return g.reshape(g.shape[0], 1, g.shape[1] if g.dim() > 2 else 1, -1, g.shape[-1])
