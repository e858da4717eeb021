"""`nn.MultiheadAttention`: its projections are Linear layers whose own hooks never fire, so that q, k, v and the heads are computed again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.layers.base import Piece, Ragged, Rule, wide
from precond.layers.linear import LinearRule
from precond.layers.registration import register
from precond.observe import LayerColumns, Tensors, batched_grad

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


def _module(seen: LayerColumns) -> nn.MultiheadAttention:
    assert isinstance(seen.module, nn.MultiheadAttention)
    return seen.module


def tokens(seen: LayerColumns) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as (N, length, width), in at least float32; one tensor three times where the call was on one."""
    module, given = _module(seen), _arguments(seen)
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


def _refused(module: nn.MultiheadAttention) -> str | None:
    if module.training and module.dropout > 0:
        return f"its attention weights have dropout {module.dropout}, which would draw another mask when they are computed again: use dropout=0"
    return None


def _parameter(module: nn.MultiheadAttention, name: str, position: int) -> Tensor | None:
    """The q, k or v part of the packed or separate 'weight', or of the packed 'bias'."""
    if name == "bias":
        packed = module.in_proj_bias
    elif module._qkv_same_embed_dim:
        packed = module.in_proj_weight
    else:
        return wide((module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[position].detach())
    return None if packed is None else wide(packed.detach().chunk(3)[position])


def _mask(seen: LayerColumns, like: Tensor, keys: int) -> Tensor | None:
    """What is added to the scores (N, H, L, S) of the keys that were given: 0 or -inf where a mask is boolean."""
    given, heads = _arguments(seen), _module(seen).num_heads
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    length = like.shape[2]

    def added(mask: Tensor) -> Tensor:
        return mask.to(like.dtype) if mask.is_floating_point() else like.new_zeros(mask.shape).masked_fill(mask, -math.inf)

    if given["is_causal"] and padding is None and not given["need_weights"]:  # the only case in which torch goes by the hint
        mask = torch.ones(length, keys, dtype=torch.bool, device=like.device).triu(1)
    total = None if mask is None else added(mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads)))
    if padding is not None:
        hidden = added(padding)[:, None, None, :]
        total = hidden if total is None else total + hidden
    return total


def attend(seen: LayerColumns) -> Attended:
    """The call once more, differentiable in what the projections gave."""
    module, inputs = _module(seen), tokens(seen)
    reason = _refused(module)
    if reason is not None:
        raise ObservationError(
            f"layer {seen.name!r} (MultiheadAttention) is refused: {reason}; or leave it out, overrides={{{seen.name!r}: None}}."
        )
    leaves = []
    for i, x in enumerate(inputs):
        weight = _parameter(module, "weight", i)
        assert weight is not None
        leaves.append(F.linear(x, weight.to(x.dtype), _parameter(module, "bias", i)))
    if module.bias_k is not None and module.bias_v is not None:
        leaves += [wide(b.detach()).expand(len(inputs[0]), 1, -1).clone() for b in (module.bias_k, module.bias_v)]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        q, k, v = leaves[:3]
        given_keys = k.shape[1]
        if len(leaves) == 5:
            k, v = torch.cat([k, leaves[3]], 1), torch.cat([v, leaves[4]], 1)
        if module.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        mask = _mask(seen, scores, given_keys)
        weights = (scores if mask is None else scores + F.pad(mask, (0, scores.shape[3] - given_keys))).softmax(-1)
        context = (weights @ v).transpose(1, 2).flatten(2)
        if _arguments(seen)["average_attn_weights"]:
            weights = weights.mean(1)
    return Attended(inputs, tuple(leaves), context, weights)


def output_grad(seen: LayerColumns) -> Tensor:
    """(K, N, L, width) at the module's output."""
    module, grad = _module(seen), seen.grads[0]
    if grad is None:  # only the weights were used
        query = _arguments(seen)["query"]
        columns = next(len(g) for g in seen.grads if g is not None)
        grad = query.new_zeros(columns, *query.shape)
    return wide(grad if module.batch_first else grad.transpose(1, 2))


def projected_grads(seen: LayerColumns) -> list[Tensor]:
    """(K, N, length, width) at q, k, v and at the extra key and value, if any."""
    module, call = _module(seen), attend(seen)
    g = output_grad(seen)
    outputs, cotangents = [call.context], [g @ wide(module.out_proj.weight.detach()).to(g.dtype)]
    if len(seen.grads) > 1 and seen.grads[1] is not None:
        outputs.append(call.weights)
        cotangents.append(wide(seen.grads[1]))
    found = batched_grad(outputs, call.projected, cotangents)
    return [torch.zeros_like(p).expand(len(g), *p.shape) if f is None else f.detach() for p, f in zip(call.projected, found, strict=True)]


class OfAttention(LinearRule):
    """A piece: it has the calls of the whole."""

    def leading(self, seen: LayerColumns) -> int:
        return tokens(seen)[0].shape[0]


class InProjection(OfAttention):
    """Three Linear layers, of query, key and value, in one (3 d, d) weight: as many groups. Their inputs may be one tensor, or differ."""

    packed = True

    def groups(self, module: nn.Module) -> int:
        return 3

    def inputs(self, seen: LayerColumns) -> Tensor | Ragged:
        inputs = tokens(seen)
        if inputs[0] is inputs[1] is inputs[2]:
            return inputs[0].expand(3, *inputs[0].shape)
        if len({x.shape[1] for x in inputs}) == 1:
            return torch.stack(inputs)
        ones = [x.new_ones(x.shape[:2]) for x in inputs]
        longest = max(x.shape[1] for x in inputs)
        return Ragged(
            torch.stack([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in inputs]),
            torch.stack([F.pad(x, (0, longest - x.shape[1])) for x in ones]),
        )

    def outputs(self, seen: LayerColumns) -> Tensor:
        grads = projected_grads(seen)[:3]
        longest = max(g.shape[2] for g in grads)
        return torch.stack([F.pad(g, (0, 0, 0, longest - g.shape[2])) for g in grads], 1)

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        grads = [g[:, examples] for g in projected_grads(seen)[:3]]
        out: Tensors = {}
        if "weight" in names:
            out["weight"] = torch.cat([torch.einsum("knro,nri->knoi", g, x[examples]) for g, x in zip(grads, tokens(seen), strict=True)], 2)
        if "bias" in names:
            out["bias"] = torch.cat([g.sum(2) for g in grads], 2)
        return out

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        grads = projected_grads(seen)[:3]
        out: Tensors = {}
        if "weight" in names:
            out["weight"] = torch.cat([torch.einsum("knro,nri->oi", g, x) for g, x in zip(grads, tokens(seen), strict=True)])
        if "bias" in names:
            out["bias"] = torch.cat([g.sum((0, 1, 2)) for g in grads])
        return out


@dataclass(frozen=True, eq=False)
class Projection(OfAttention):
    """One of three separate weights, where key and value have widths of their own."""

    position: int

    def inputs(self, seen: LayerColumns) -> Tensor:
        return tokens(seen)[self.position].unsqueeze(0)

    def outputs(self, seen: LayerColumns) -> Tensor:
        return projected_grads(seen)[self.position].unsqueeze(1)

    def weight_shape(self, seen: LayerColumns) -> torch.Size:
        weight = _parameter(_module(seen), "weight", self.position)
        assert weight is not None
        return weight.shape


class OutProjection(OfAttention):
    """A Linear layer on the heads side by side."""

    def inputs(self, seen: LayerColumns) -> Tensor:
        return attend(seen).context.detach().unsqueeze(0)

    def outputs(self, seen: LayerColumns) -> Tensor:
        return output_grad(seen).unsqueeze(1)

    def weight_shape(self, seen: LayerColumns) -> torch.Size:
        return _module(seen).out_proj.weight.shape


@dataclass(frozen=True, eq=False)
class Added(Rule):
    """The bias of separate projections, or the extra key or value: what is added at some of the projections' outputs."""

    positions: tuple[int, ...]

    def leading(self, seen: LayerColumns) -> int:
        return tokens(seen)[0].shape[0]

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        grads = projected_grads(seen)
        summed = torch.cat([grads[i][:, examples].sum(2) for i in self.positions], 2)
        return {"bias": summed if len(self.positions) == 3 else summed[:, :, None, None]}  # (1, 1, width) of an extra key


IN, OUT, QUERY, KEY, VALUE = InProjection(), OutProjection(), Projection(0), Projection(1), Projection(2)
BIAS, EXTRA_KEY, EXTRA_VALUE = Added((0, 1, 2)), Added((3,)), Added((4,))


@register(nn.MultiheadAttention)
class Attention(Rule):
    """softmax(q k^T / sqrt(head width) + mask) v, with q, k, v and the output by Linear layers, which are its pieces.

    K-FAC has a pair of factors each for query, key and value, packed in one weight or not, and one for the output. Dropout of
    the attention weights is refused in training mode.
    """

    def pieces(self, module: nn.Module) -> Mapping[str, Piece]:
        assert isinstance(module, nn.MultiheadAttention)
        if module._qkv_same_embed_dim:
            projections = {"in_proj": Piece(IN, {"weight": "in_proj_weight", "bias": "in_proj_bias"})}
        else:
            separate = {"q_proj": QUERY, "k_proj": KEY, "v_proj": VALUE}
            projections = {n: Piece(rule, {"weight": f"{n}_weight"}) for n, rule in separate.items()}
            projections["in_proj"] = Piece(BIAS, {"bias": "in_proj_bias"})
        return projections | {
            "bias_k": Piece(EXTRA_KEY, {"bias": "bias_k"}),
            "bias_v": Piece(EXTRA_VALUE, {"bias": "bias_v"}),
            "out_proj": Piece(OUT, {"weight": "out_proj.weight", "bias": "out_proj.bias"}),
        }

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        out: Tensors = {}
        for piece in self.pieces(seen.module).values():
            wanted = {role: name for role, name in piece.parameters.items() if name in names}
            if wanted:
                out |= {wanted[role]: g for role, g in piece.rule.gradients(seen, list(wanted), examples).items()}
        return out

    def total(self, seen: LayerColumns, names: Sequence[str]) -> Tensors:
        out: Tensors = {}
        for piece in self.pieces(seen.module).values():
            wanted = {role: name for role, name in piece.parameters.items() if name in names}
            if wanted:
                out |= {wanted[role]: g for role, g in piece.rule.total(seen, list(wanted)).items()}
        return out

    def leading(self, seen: LayerColumns) -> int:
        return tokens(seen)[0].shape[0]

    def knows(self, module: nn.Module) -> bool:
        held = {name for piece in self.pieces(module).values() for name in piece.parameters.values()}
        return {name for name, _ in module.named_parameters()} <= held

    def refuse(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        return _refused(module)
