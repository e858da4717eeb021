"""One call of `nn.MultiheadAttention` computed again: q, k, v and the heads, and what comes back at them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.layers.base import wide
from precond.observe import LayerColumns, batched_grad, drawing_again

_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_DEFAULTS = {"need_weights": True, "average_attn_weights": True, "is_causal": False}


@dataclass(frozen=True)
class Attended:
    """One call, examples first, and what it computed. tokens: the three inputs. projected: q, k, v and the extra key and value, if any."""

    tokens: tuple[Tensor, Tensor, Tensor]
    projected: tuple[Tensor, ...]
    context: Tensor
    weights: Tensor


def _arguments(seen: LayerColumns) -> dict[str, Any]:
    return _DEFAULTS | dict(zip(_ARGUMENTS, seen.args, strict=False)) | dict(seen.kwargs)


def attention_of(seen: LayerColumns) -> nn.MultiheadAttention:
    """The module of a call."""
    assert isinstance(seen.module, nn.MultiheadAttention)
    return seen.module


def tokens(seen: LayerColumns) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as (N, length, width), in at least float32; one tensor three times where the call was on one."""
    module, given = attention_of(seen), _arguments(seen)
    inputs: list[Tensor] = [given[name] for name in ("query", "key", "value")]
    if inputs[0].dim() != 3:
        raise ObservationError(
            f"layer {seen.name!r} (MultiheadAttention) takes a query without a batch: give it a 3-dimensional one (unsqueeze for a single "
            f"example), or leave it out with overrides={{{seen.name!r}: None}}."
        )
    if len({(x.data_ptr(), x.shape, x.stride()) for x in inputs}) == 1:
        inputs = [wide(inputs[0])] * 3
    q, k, v = (wide(x if module.batch_first else x.transpose(0, 1)) for x in inputs)
    return (q, q, q) if inputs[0] is inputs[1] is inputs[2] else (q, k, v)


def _dropped(seen: LayerColumns, weights: Tensor) -> Tensor:
    """The attention weights under the mask that the call drew."""
    module = attention_of(seen)
    if seen.drawn is None or module.dropout == 0:
        return weights
    with drawing_again(seen.drawn.states, weights.device):
        return F.dropout(weights, module.dropout)


def _check_mask(seen: LayerColumns, context: Tensor) -> None:
    """A fused kernel draws in an order of its own: then what is computed again is not what was given."""
    if seen.drawn is None:
        return
    module, given = attention_of(seen), seen.drawn.output.detach()
    bias = module.out_proj.bias
    again = F.linear(context.detach(), wide(module.out_proj.weight.detach()), None if bias is None else wide(bias.detach()))
    output = wide(given if module.batch_first else given.transpose(0, 1))
    if bool((again - output).norm() > max(1e-3, torch.finfo(given.dtype).eps ** 0.5) * output.norm()):
        raise ObservationError(
            f"layer {seen.name!r} (MultiheadAttention) dropped attention weights in a fused kernel, whose mask cannot be drawn again: run the "
            "model under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), call the layer with need_weights=True, use dropout=0, or leave it out "
            f"with overrides={{{seen.name!r}: None}}."
        )


def weight_or_bias(module: nn.MultiheadAttention, name: str, position: int) -> Tensor | None:
    """The q, k or v part of the packed or separate 'weight', or of the packed 'bias'."""
    if name == "bias":
        packed = module.in_proj_bias
    elif module._qkv_same_embed_dim:
        packed = module.in_proj_weight
    else:
        return wide((module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[position].detach())
    return None if packed is None else wide(packed.detach().chunk(3)[position])


def _mask(seen: LayerColumns, like: Tensor) -> Tensor | None:
    """What is added to the scores (N, H, L, S) of the keys that were given, or of all: 0 or -inf where a mask is boolean."""
    given, heads = _arguments(seen), attention_of(seen).num_heads
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")

    def added(mask: Tensor) -> Tensor:
        return mask.to(like.dtype) if mask.is_floating_point() else like.new_zeros(mask.shape).masked_fill(mask, -math.inf)

    if given["is_causal"] and padding is None and not given["need_weights"]:  # the only case in which torch goes by the hint
        mask = torch.ones(like.shape[2:], dtype=torch.bool, device=like.device).triu(1)
    total = None if mask is None else added(mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads)))
    if padding is not None:
        hidden = added(padding)[:, None, None, :]
        total = hidden if total is None else total + hidden
    return total


def attend(seen: LayerColumns) -> Attended:
    """The call once more, differentiable in what the projections gave."""
    module, inputs = attention_of(seen), tokens(seen)
    leaves = []
    for i, x in enumerate(inputs):
        weight = weight_or_bias(module, "weight", i)
        assert weight is not None
        leaves.append(F.linear(x, weight.to(x.dtype), weight_or_bias(module, "bias", i)))
    if module.bias_k is not None and module.bias_v is not None:
        leaves += [wide(b.detach()).expand(len(inputs[0]), 1, -1).clone() for b in (module.bias_k, module.bias_v)]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        q, k, v = leaves[:3]
        if len(leaves) == 5:
            k, v = torch.cat([k, leaves[3]], 1), torch.cat([v, leaves[4]], 1)
        if module.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        mask = _mask(seen, scores)
        weights = (scores if mask is None else scores + F.pad(mask, (0, scores.shape[3] - mask.shape[-1]))).softmax(-1)
        weights = _dropped(seen, weights)
        context = (weights @ v).transpose(1, 2).flatten(2)
        if _arguments(seen)["average_attn_weights"]:
            weights = weights.mean(1)
    _check_mask(seen, context)
    return Attended(inputs, tuple(leaves), context, weights)


def output_grad(seen: LayerColumns) -> Tensor:
    """(K, N, L, width) at the module's output."""
    module, grad = attention_of(seen), seen.grads[0]
    if grad is None:  # only the weights were used
        query = _arguments(seen)["query"]
        columns = next(len(g) for g in seen.grads if g is not None)
        grad = query.new_zeros(columns, *query.shape)
    return wide(grad if module.batch_first else grad.transpose(1, 2))


def projected_grads(seen: LayerColumns) -> list[Tensor]:
    """(K, N, length, width) at q, k, v and at the extra key and value, if any."""
    module, call = attention_of(seen), attend(seen)
    g = output_grad(seen)
    outputs, cotangents = [call.context], [g @ wide(module.out_proj.weight.detach()).to(g.dtype)]
    if len(seen.grads) > 1 and seen.grads[1] is not None:
        outputs.append(call.weights)
        cotangents.append(wide(seen.grads[1]))
    found = batched_grad(outputs, call.projected, cotangents)
    return [torch.zeros_like(p).expand(len(g), *p.shape) if f is None else f.detach() for p, f in zip(call.projected, found, strict=True)]
