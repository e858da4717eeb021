"""Moments of layer inputs: the factor A, and I (x) A where only inputs are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from precond.blocks import Block, Parameter, leading_size
from precond.layers import OneHot, check_examples
from precond.observe import Factors, Part


def input_rows(part: Part, block: Block, *, check: bool = False) -> list[Tensor | OneHot]:
    """The inputs (G, N, R, in') of every call, with the homogeneous coordinate where the block has a bias.

    check: refuse layers whose leading dimension is not the batch.
    """
    rows: list[Tensor | OneHot] = []
    bias = block.names[-1] if block.homogeneous else None
    for layer, seen in block.calls(part):
        if check:
            check_examples(seen, leading_size(seen) if seen.rows is None else seen.batch)
        a = layer.rule.inputs(seen)
        # 0 for a use of a tied weight that has no share in the block's bias
        one = 1.0 if bias in layer.parameters.values() else 0.0
        rows.append(torch.cat([a, a.new_full((*a.shape[:-1], 1), one)], dim=-1) if bias and isinstance(a, Tensor) else a)
    return rows


def input_sums(rows: Sequence[Tensor | OneHot], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sum of a a^T, the number of rows); the sum is (in', in'), (G, in', in'), or the counts of one-hot rows (V,)."""
    hot = [r for r in rows if isinstance(r, OneHot)]
    if hot:
        counts = torch.zeros(hot[0].size, dtype=dtype, device=hot[0].index.device)
        for h in hot:
            counts.index_add_(0, h.index.reshape(-1), h.mask.reshape(-1).to(dtype))
        return counts, counts.sum()
    flat = [r.flatten(1, 2) for r in rows if isinstance(r, Tensor)]
    return second_moment(flat), flat[0].new_full((), sum(x.shape[1] for x in flat))


def second_moment(rows: Sequence[Tensor]) -> Tensor:
    """Sum over rows of x x^T: (G, n, d) -> (G, d, d), (d, d) for one group."""
    total = rows[0].transpose(1, 2) @ rows[0]
    for x in rows[1:]:
        total = total + x.transpose(1, 2) @ x
    return total.squeeze(0) if total.shape[0] == 1 else total


def input_moment(observation: Factors, block: Block) -> Tensor | None:
    """A over all parts of the step, every row with the weight of one term; None where the layer was not called."""
    total: Tensor | None = None
    count = torch.zeros_like(observation.weight)
    for part in observation.parts:
        rows = input_rows(part, block)
        if rows:
            weight = part.share * part.scale
            sums, number = input_sums(rows, _dtype(block))
            total = sums * weight.to(sums.dtype) if total is None else total + sums * weight.to(sums.dtype)
            count = count + number * weight
    return None if total is None else total / count.to(total.dtype)


def _dtype(block: Block) -> torch.dtype:
    """What moments of one-hot rows are kept in: that of the weight, in at least float32."""
    weight = next(next(iter(block.layers.values())).module.parameters())
    return torch.promote_types(weight.dtype, torch.float32)


def unit_blocks(observation: Factors, block: Block) -> Tensor | None:
    """The diagonal blocks of I (x) A by row of a block in matrix coordinates, (rows, width, width)."""
    A = input_moment(observation, block)
    if A is None:
        return None
    rows, width = block.shape
    if A.dim() == 1:  # one-hot rows, weight stored input first: A (x) I
        return A.view(rows, 1, 1) * torch.eye(width, dtype=A.dtype, device=A.device)
    return A.expand(rows, width, width).clone() if A.dim() == 2 else A.repeat_interleave(rows // A.shape[0], dim=0)


def input_matrix(observation: Factors, block: Block) -> Tensor:
    """I (x) A of every layer of a block in flat coordinates, (n, n); nothing between layers."""
    owners: dict[str, list[Parameter]] = {}
    for p in block.parameters:
        owners.setdefault(p.owner, []).append(p)
    pieces = []
    for owner, params in owners.items():
        flat = Block(
            owner, tuple(params), {n: layer for n, layer in block.layers.items() if any(n == u for p in params for u, _ in p.uses)}
        )
        table = replace(flat, rows=params[0].shape[0])
        blocks = unit_blocks(observation, table)
        if blocks is None:  # not called in this step
            pieces.append(torch.zeros(flat.n, flat.n, dtype=_dtype(flat), device=observation.weight.device))
            continue
        start = params[0].start
        order = table.positions() - start
        dense = torch.zeros(flat.n, flat.n, dtype=blocks.dtype, device=blocks.device)
        dense[order.unsqueeze(1), order] = torch.block_diag(*blocks)
        pieces.append(dense)
    whole: Tensor = torch.block_diag(*pieces)
    return whole
