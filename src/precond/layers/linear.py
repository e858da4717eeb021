"""`nn.Linear` with any number of leading dimensions, and what every layer with the normal form shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from precond.layers.base import Rule, layer_grad, layer_input
from precond.layers.registration import register
from precond.observe import LayerColumns, Tensors


class LinearRule(Rule):
    """Rows of (a, g) in, gradients out; shared by every layer that has the normal form."""

    joint = True
    linear = True

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        out: Tensors = {}
        if "weight" in names:
            rows = self.rows(seen)
            assert isinstance(rows.a, Tensor)
            a, g = rows.a[:, examples], rows.g[:, :, examples]
            weight = torch.einsum("kgnro,gnri->kngio" if self.input_first else "kgnro,gnri->kngoi", g, a)
            out["weight"] = weight.reshape(*weight.shape[:2], *self.weight_shape(seen))
        if "bias" in names:
            out["bias"] = self.bias(seen)[:, examples]
        return out

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        out: Tensors = {}
        if "weight" in names:
            rows = self.rows(seen)
            assert isinstance(rows.a, Tensor)
            weight = torch.einsum("kgnro,gnri->gio" if self.input_first else "kgnro,gnri->goi", rows.g, rows.a)
            out["weight"] = weight.reshape(self.weight_shape(seen))
        if "bias" in names:
            out["bias"] = self.bias(seen).sum((0, 1))
        return out

    def weight_shape(self, seen: LayerColumns) -> torch.Size:
        return seen.module.get_parameter("weight").shape

    def bias(self, seen: LayerColumns) -> Tensor:
        """Gradients of the bias by column and example, (K, N, out)."""
        return torch.einsum("kgnro->kngo", self.outputs(seen)).flatten(2)


@register(nn.Linear)
class Linear(LinearRule):
    """s = W a + b: the input is (N, *, in), the positions between are shared."""

    def inputs(self, seen: LayerColumns) -> Tensor:
        a = layer_input(seen)
        return a.reshape(1, a.shape[0] if a.dim() > 1 else 1, -1, a.shape[-1])

    def outputs(self, seen: LayerColumns) -> Tensor:
        g = layer_grad(seen)
        return g.reshape(g.shape[0], 1, g.shape[1] if g.dim() > 2 else 1, -1, g.shape[-1])


@register("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
class Conv1D(Linear):
    """The Linear layer of GPT-2 in `transformers`, whose weight is stored (in, out)."""

    input_first = True
