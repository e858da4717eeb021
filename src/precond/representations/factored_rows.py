"""Rows u = sum_r g_r (x) a_r of a block, kept as their factors by parameter: what a Gram matrix is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from precond.blocks import Block, Layer, Parameter
from precond.layers import OneHot, Ragged
from precond.observe import LayerColumns, Part
from precond.operators.gram import Layer as Factors

Pair = tuple[Tensor, Tensor]
"""a (N, K or 1, R, in) and g (N, K or 1, R, out): row (i, k) is sum_r g_ikr (x) a_ikr, (out, in) row-major. Rows as they are have a of ones."""
_GROUPS = 4  # more groups are as many small products: their gradients by example are small as well


@dataclass(frozen=True)
class Slot:
    """Some rows of one parameter, stored (out, in): those of one group of a layer, or all.

    kind: "outer"; "one_hot", where a holds indices into the `out` rows; or "rows", for what has no factors.
    """

    parameter: Parameter
    kind: str
    group: int
    out: int
    width: int

    def pair(self, part: Part, block: Block) -> Pair | None:
        """The factors of one part, unscaled; None where the parameter was not used."""
        uses = list(_uses(part, block, self.parameter))
        if not uses:
            return None
        for layer, _, seen in uses:
            layer.rule.check(seen)
        if self.kind == "rows":
            return _plain(uses, self.parameter)
        if self.kind == "one_hot":
            _, view, seen = uses[0]
            hot, g = view.rule.inputs(seen), view.rule.outputs(seen)
            assert isinstance(hot, OneHot)
            index = hot.index.to(torch.float64)  # exact, and of the kind that statistics are
            return index[:, None, :, None], g[:, 0].movedim(0, 1)
        pairs = [self._outer(view, seen) for _, view, seen in uses]
        a, g = (torch.cat(found, 2) if len(found) > 1 else found[0] for found in zip(*pairs, strict=True))
        return a, g

    def settle(self, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """The rows themselves where they are fewer numbers than their factors, as those of a convolution may be."""
        if self.kind != "outer" or all(a.shape[2] == 1 for a, _ in pairs):
            return pairs
        rows = sum(len(g) * max(a.shape[1], g.shape[1]) * self.out * self.width for a, g in pairs)
        if rows > sum(a.numel() + g.numel() for a, g in pairs):
            return pairs
        made = (torch.einsum("nkro,nkri->nkoi", *(t.expand(-1, max(a.shape[1], g.shape[1]), -1, -1) for t in (g, a))) for a, g in pairs)
        return [(_ones(r), r.flatten(2).unsqueeze(2)) for r in made]

    def _outer(self, view: Layer, seen: LayerColumns) -> Pair:
        inputs, g = view.rule.inputs(seen), view.rule.outputs(seen)
        a = inputs.a if isinstance(inputs, Ragged) else inputs
        assert isinstance(a, Tensor)
        first, second = a[self.group].unsqueeze(1), g[:, self.group].movedim(0, 1)
        return (second, first) if view.rule.input_first else (first, second)

    def nothing(self, columns: int, like: Tensor) -> Pair:
        """The factors of no examples."""
        if self.kind == "one_hot":
            return torch.zeros(0, 1, 1, 1, dtype=torch.float64, device=like.device), like.new_zeros(0, columns, 1, self.width)
        inside, outside = (self.width, self.out) if self.kind == "outer" else (1, self.out * self.width)
        return like.new_zeros(0, 1, 1, inside), like.new_zeros(0, columns, 1, outside)

    def factors(self, a: Tensor, g: Tensor) -> Factors | Tensor:
        """What `Gram` is made of, rows k outermost."""
        columns = max(a.shape[1], g.shape[1])
        if self.kind == "one_hot":
            return a[:, 0, :, 0].long(), outermost(g), self.out
        if a.shape[2] == 1 and a.shape[3] == 1:
            return outermost(g * a).squeeze(1)
        if a.shape[1] == 1:
            return a.squeeze(1), outermost(g)
        return outermost(a), outermost(g.expand(-1, columns, -1, -1))


def outermost(t: Tensor) -> Tensor:
    """(N, K, ...) -> (K N, ...)."""
    return t.movedim(1, 0).flatten(0, 1)


def slots(block: Block) -> list[Slot]:
    """The pieces of a block in flat coordinates, in their order."""
    made = []
    for p in block.parameters:
        views = [(_view(layer, p), local) for layer in block.layers.values() for local, name in layer.parameters.items() if name == p.name]
        rules = [view.rule for view, _ in views]
        out = p.shape[0] if p.shape else 1
        factored = all(rule.linear and view.parameters.get("weight") == p.name for rule, (view, _) in zip(rules, views, strict=True))
        groups = rules[0].groups(views[0][0].module) if factored else 1
        if factored and rules[0].one_hot and len(views) == 1:
            made.append(Slot(p, "one_hot", 0, out, p.numel // out))
        elif factored and not rules[0].one_hot and all(rule is rules[0] for rule in rules) and groups <= _GROUPS:
            made.extend(Slot(p, "outer", group, out // groups, p.numel // out) for group in range(groups))
        else:
            made.append(Slot(p, "rows", 0, out, p.numel // out))
    return made


def _view(layer: Layer, p: Parameter) -> Layer:
    """The piece of a layer whose weight a parameter is, or the layer."""
    return next((piece for piece in layer.pieces().values() if piece.parameters.get("weight") == p.name), layer)


def _uses(part: Part, block: Block, p: Parameter) -> Iterator[tuple[Layer, Layer, LayerColumns]]:
    for layer, seen in block.calls(part):
        if p.name in layer.parameters.values():
            yield layer, _view(layer, p), seen


def _plain(uses: Sequence[tuple[Layer, Layer, LayerColumns]], p: Parameter) -> Pair:
    total: Tensor | None = None
    for layer, _, seen in uses:
        local = [n for n, name in layer.parameters.items() if name == p.name]
        for gradient in layer.rule.gradients(seen, local, slice(None)).values():
            total = gradient if total is None else total + gradient
    assert total is not None
    rows = total.reshape(*total.shape[:2], -1).movedim(0, 1)  # a parameter may be a number
    return _ones(rows), rows.unsqueeze(2)


def _ones(rows: Tensor) -> Tensor:
    return rows.new_ones(len(rows), 1, 1, 1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The examples of all parts; positions that a part does not have are zeros."""
    longest = max(t.shape[2] for t in parts)
    return torch.cat([pad(t, (0, 0) * (t.dim() - 3) + (0, longest - t.shape[2])) for t in parts]) if len(parts) > 1 else parts[0]
