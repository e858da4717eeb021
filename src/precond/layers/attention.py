"""`nn.MultiheadAttention`: its projections are Linear layers whose own hooks never fire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.layers.attended import attend, attention_of, output_grad, projected_grads, tokens, weight_or_bias
from precond.layers.base import Piece, Ragged, Rule
from precond.layers.linear import LinearRule
from precond.layers.registration import register
from precond.observe import LayerColumns, Tensors


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
        weight = weight_or_bias(attention_of(seen), "weight", self.position)
        assert weight is not None
        return weight.shape


class OutProjection(OfAttention):
    """A Linear layer on the heads side by side."""

    def inputs(self, seen: LayerColumns) -> Tensor:
        return attend(seen).context.detach().unsqueeze(0)

    def outputs(self, seen: LayerColumns) -> Tensor:
        return output_grad(seen).unsqueeze(1)

    def weight_shape(self, seen: LayerColumns) -> torch.Size:
        return attention_of(seen).out_proj.weight.shape


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

    K-FAC has a pair of factors each for query, key and value, packed in one weight or not, and one for the output. A
    mask of dropout on the attention weights is drawn again from the generator's state before the call, and the output compared.
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
