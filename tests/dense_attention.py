"""`nn.MultiheadAttention` written out with four Linear layers, head by head: what its packed parameters mean.

Claims:

* `plain(model)` computes what the model does, with a `Plain` in place of each `nn.MultiheadAttention`, so that an oracle of Linear
  layers is one of its projections;
* `projections(model, name)` are the places in theta of vec[W, b] of each of them, in the order of `Plain`'s layers; a bias that is packed
  while weights are separate has no row of its own to stand in, and frozen ones no place.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from dense_blocks import positions


class Plain(nn.Module):
    """Boolean masks only; True hides."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first, self.zero = packed.num_heads, packed.batch_first, packed.add_zero_attn
        weights = (
            packed.in_proj_weight.chunk(3)
            if packed._qkv_same_embed_dim
            else (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        )
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.extra = [None if b is None else b.detach() for b in (packed.bias_k, packed.bias_v)]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        examples = []
        weights = []
        q, k, v = self.q(query), self.k(key), self.v(value)
        for i in range(len(query)):
            hidden = torch.zeros(query.shape[1], key.shape[1], dtype=torch.bool)
            if attn_mask is not None:
                hidden = hidden | attn_mask
            if key_padding_mask is not None:
                hidden = hidden | key_padding_mask[i]
            parts = [self._head(q[i], k[i], v[i], hidden, h) for h in range(self.heads)]
            examples.append(torch.cat([context for context, _ in parts], 1))
            weights.append(torch.stack([w for _, w in parts]))
        attended, shares = self.out(torch.stack(examples)), torch.stack(weights)
        return attended if self.batch_first else attended.transpose(0, 1), shares.mean(1) if average_attn_weights else shares

    def _head(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, head: int) -> tuple[Tensor, Tensor]:
        for extra in (self.extra, [torch.zeros(1, 1, q.shape[1])] * 2 if self.zero else [None, None]):
            if extra[0] is not None:
                k, v = (torch.cat([x, row[0].to(x)]) for x, row in zip((k, v), extra, strict=True))
                hidden = torch.cat([hidden, torch.zeros(len(hidden), 1, dtype=torch.bool)], 1)
        width = q.shape[1] // self.heads
        q, k, v = (x[:, head * width : (head + 1) * width] for x in (q, k, v))
        scores = (q @ k.T / math.sqrt(width)).masked_fill(hidden, -math.inf)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        return weights @ v, weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def plain(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, Plain(module))
    return model


def projections(model: nn.Module, name: str) -> dict[str, Tensor]:
    """{q, k, v, out: places in theta}; of separate weights those of W alone."""
    module, places = model.get_submodule(name), positions(model)

    def where(local: str) -> Tensor:
        place = places[f"{name}.{local}"]
        return torch.arange(place.start, place.stop).reshape(module.get_parameter(local).shape)

    def joint(weight: Tensor, bias: str, part: int | None = None) -> Tensor:
        if f"{name}.{bias}" not in places:
            return weight.flatten()
        column = where(bias) if part is None else where(bias).chunk(3)[part]
        return torch.cat([weight, column.unsqueeze(1)], 1).flatten()

    if module._qkv_same_embed_dim and f"{name}.in_proj_weight" not in places:
        found = {}
    elif module._qkv_same_embed_dim:
        found = {n: joint(where("in_proj_weight").chunk(3)[i], "in_proj_bias", i) for i, n in enumerate("qkv")}
    else:
        found = {n: where(f"{n}_proj_weight").flatten() for n in "qkv"}
    return found | {"out": joint(where("out_proj.weight"), "out_proj.bias")}
