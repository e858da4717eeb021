"""Moments of layer inputs: the factor A, and B (x) A where B is known apart from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from precond.blocks import Block, Parameter
from precond.errors import ObservationError
from precond.layers import OneHot, Ragged, counts_up
from precond.layers.base import ROWS_AT_ONCE
from precond.observe import Factors, LayerColumns, Part
from precond.representations.outputs import output_moment

InputRows = Tensor | OneHot | Ragged


def input_rows(part: Part, block: Block, *, check: bool = False) -> list[InputRows]:
    """The inputs (G, N, R, in') of every call, with the homogeneous coordinate where the block has a bias.

    check: refuse layers whose leading dimension is not the batch.
    """
    rows: list[InputRows] = []
    bias = block.names[-1] if block.homogeneous else None
    for layer, seen in block.calls(part):
        if check:
            layer.rule.check(seen)
        else:
            _refuse_shared(seen)
        a = layer.rule.inputs(seen)
        # 0 for a use of a tied weight that has no share in the block's bias
        one = 1.0 if bias in layer.parameters.values() else 0.0
        if bias and isinstance(a, Tensor) and is_shared(a):
            rows.append(_extended(a[:1], a.new_full((1, *a.shape[1:3]), one)).expand(len(a), -1, -1, -1))
        elif bias and isinstance(a, Tensor):
            rows.append(_extended(a, a.new_full(a.shape[:3], one)))
        else:
            rows.append(Ragged(_extended(a.a, a.mask * one), a.mask) if bias and isinstance(a, Ragged) else a)
    return rows


def _refuse_shared(seen: LayerColumns) -> None:
    """A call that all examples share gets back the sum of their gradients, whose square is not the sum of squares."""
    shape = seen.input.shape
    alone = len(shape) > 1 and shape[0] == 1 and shape[1] != seen.batch
    uneven = len(shape) == 1 and not seen.input.is_floating_point() and shape[0] % seen.batch != 0
    if seen.rows is None and seen.batch > 1 and (alone or uneven or counts_up(seen)):
        raise ObservationError(
            f"layer {seen.name!r} was called on {tuple(shape)} for a batch of {seen.batch} examples, once for all of them as it seems, so that their "
            f"gradients come back as one sum: say so with rows={{{seen.name!r}: 'shared'}}, or leave it out with overrides={{{seen.name!r}: None}}."
        )


def _extended(a: Tensor, ones: Tensor) -> Tensor:
    return torch.cat([a, ones.unsqueeze(-1)], dim=-1)


def is_shared(a: Tensor) -> bool:
    """Whether groups read one and the same input (G, ...), which is then computed with once."""
    return a.shape[0] > 1 and a.stride(0) == 0


def averaged(rows: Sequence[InputRows]) -> list[InputRows]:
    """The mean over the positions of all calls, (G, N, 1, in')."""
    given = [_with_mask(r) for r in rows if not isinstance(r, OneHot)]
    total = torch.stack([a.sum(2, keepdim=True) for a, _ in given]).sum(0)
    return [total / torch.stack([mask.sum(2)[:, :, None, None] for _, mask in given]).sum(0)]


def _with_mask(rows: Tensor | Ragged) -> tuple[Tensor, Tensor]:
    """Rows (G, N, R, in'), and (G, N, R), 1 where one is given."""
    if isinstance(rows, Ragged):
        return rows.a, rows.mask
    return rows, rows.new_ones(()).expand(rows.shape[:3])


def input_sums(rows: Sequence[InputRows], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sum of a a^T, the number of rows); the sum is (in', in'), (G, in', in'), or the counts of one-hot rows (V,).

    The number is (G, 1, 1) where there are groups.
    """
    hot = [r for r in rows if isinstance(r, OneHot)]
    if hot:
        counts = torch.zeros(hot[0].size, dtype=dtype, device=hot[0].index.device)
        for h in hot:
            counts.index_add_(0, h.index.reshape(-1), h.mask.reshape(-1).to(dtype))
        return counts, counts.sum()
    return second_moment([r.a if isinstance(r, Ragged) else r for r in rows if not isinstance(r, OneHot)]), count(rows)


def count(rows: Sequence[InputRows]) -> Tensor:
    """The number of rows that are not one-hot, (G, 1, 1) where there are groups."""
    number = torch.stack([_with_mask(r)[1].sum((1, 2)) for r in rows if not isinstance(r, OneHot)]).sum(0)
    return number[:, None, None] if len(number) > 1 else number[0]


def second_moment(rows: Sequence[Tensor]) -> Tensor:
    """Sum over rows of x x^T: each (G, M, R, d) -> (G, d, d), (d, d) for one group. A large x is not copied into another layout whole."""
    total: Tensor | None = None
    for x in rows:
        # examples at a time, where positions are last, as a convolution leaves them
        step = x.shape[1] if x.stride(-1) == 1 else ROWS_AT_ONCE // max(1, x[:1, :1].numel())
        for piece in x.split(max(1, step), 1):
            square = _square(piece)
            total = square if total is None else total.add_(square)
    assert total is not None, "a layer without calls has no moments"
    return total.squeeze(0) if total.shape[0] == 1 else total


def _square(x: Tensor) -> Tensor:
    if is_shared(x):
        return _square(x[:1]).repeat(len(x), 1, 1)
    if x.stride(-1) != 1 and x.shape[2] >= 4 * x.shape[3]:
        return (x.mT @ x).sum(1)
    flat = x.flatten(1, 2)
    return flat.mT @ flat if len(flat) > 1 else (flat[0].T @ flat[0]).unsqueeze(0)


def few_examples(part: Part, block: Block) -> Iterator[Part]:
    """The part in pieces of few examples, where the rows of a block's inputs are patches, many times the size of the input itself.

    Pieces have rows of about the size of the moment that each is added to, if it is large.
    """
    calls = [seen for _, seen in block.calls(part)]
    kernels = {torch.Size(getattr(seen.module, "kernel_size", ())) for seen in calls}
    sizes = {len(seen.input) if seen.input.dim() > 2 else 0 for seen in calls}
    kernel, count = min(kernels, key=len, default=()), min(sizes, default=0)
    if len(kernels) > 1 or len(sizes) > 1 or not kernel or any(s.rows is not None or s.input.dim() != len(kernel) + 2 for s in calls):
        yield part
        return
    held = max(ROWS_AT_ONCE, _moment_size(block))
    step = max(1, held // max(1, max(seen.input[:1].numel() for seen in calls) * torch.Size(kernel).numel()))
    for start in range(0, count, step):
        end = min(start + step, count)
        layers = {
            name: tuple(replace(s, args=(s.input[start:end],), kwargs={}, batch=end - start) for s in part.layers[name])
            for name in block.layers if name in part.layers
        }  # fmt: skip
        yield replace(part, layers=layers)


def _moment_size(block: Block) -> int:
    """How many numbers A has."""
    layer, (rows, width) = next(iter(block.layers.values())), block.shape
    groups = layer.rule.groups(layer.module)
    size = width if layer.rule.joint else rows // groups
    return groups * size**2


def direct_moment(part: Part, block: Block) -> tuple[tuple[Tensor, Tensor] | None, Part]:
    """(sum of a a^T, the number of rows) of the calls whose rule has them without rows at less cost; and the part without these calls."""
    bias = block.names[-1] if block.homogeneous else None
    total: tuple[Tensor, Tensor] | None = None
    rest = {name: calls for name, calls in part.layers.items() if name not in block.layers}
    for name, layer in block.layers.items():
        kept = []
        for seen in part.layers.get(name, ()):
            _refuse_shared(seen)
            one = bias in layer.parameters.values()
            found = layer.rule.input_moment(seen, one)
            if found is None:
                kept.append(seen)
                continue
            square, number = found
            if bias and not one:
                square = torch.nn.functional.pad(square, (0, 1, 0, 1))
            square = square.squeeze(0) if len(square) == 1 else square
            rows = square.new_full((len(square), 1, 1) if square.dim() > 2 else (), number)
            total = (square, rows) if total is None else (total[0].add_(square), total[1] + rows)
        rest[name] = tuple(kept)
    return total, replace(part, layers=rest)


def input_moment(observation: Factors, block: Block) -> Tensor | None:
    """A over all parts of the step, every row with the weight of one term; None where the layer was not called."""
    total: Tensor | None = None
    count = torch.zeros_like(observation.weight)
    for part in observation.parts:
        weight = part.share * part.scale
        direct, part = direct_moment(part, block)
        formed = (input_sums(rows, _dtype(block)) for piece in few_examples(part, block) if (rows := input_rows(piece, block)))
        for sums, number in chain([direct] if direct else [], formed):
            total = sums * weight.to(sums.dtype) if total is None else total + sums * weight.to(sums.dtype)
            count = count + number * weight
    return None if total is None else total / count.to(total.dtype)


def _dtype(block: Block) -> torch.dtype:
    """What moments of one-hot rows are kept in: that of the weight, in at least float32."""
    weight = next(next(iter(block.layers.values())).module.parameters())
    return torch.promote_types(weight.dtype, torch.float32)


def unit_blocks(observation: Factors, block: Block) -> Tensor | None:
    """The diagonal blocks of B (x) A by row of a block in matrix coordinates, (rows, width, width); None without a call."""
    pair = moments(observation, block)
    if pair is None:
        return None
    A, B = pair
    rows, width = block.shape
    if A.dim() == 1:  # one-hot rows, weight stored input first: A (x) B
        return A.view(rows, 1, 1) * B
    units = A.expand(rows, width, width) if A.dim() == 2 else A.repeat_interleave(rows // A.shape[0], dim=0)
    return units * B.diagonal(dim1=-2, dim2=-1).reshape(rows, 1, 1)


def moments(observation: Factors, block: Block) -> tuple[Tensor, Tensor] | None:
    """(A, B) of a block in matrix coordinates, B the identity where outputs are not given; None without a call."""
    A = input_moment(observation, block)
    if A is None:
        return None
    rows, width = block.shape
    size = width if A.dim() == 1 else rows // (A.shape[0] if A.dim() == 3 else 1)
    eye = torch.eye(size, dtype=A.dtype, device=A.device).expand(*A.shape[:-2], size, size)
    B = eye if observation.outputs is None else output_moment(observation, block)
    return None if B is None else (A, B.to(A.dtype))


def _product(A: Tensor, B: Tensor) -> Tensor:
    """B (x) A in the order of a block's matrix coordinates, one a group; A (x) B for one-hot rows."""
    if A.dim() == 1:
        return torch.kron(A.diag(), B)
    if A.dim() == 2:
        return torch.kron(B.contiguous(), A)
    whole: Tensor = torch.block_diag(*(torch.kron(b.contiguous(), a) for a, b in zip(A, B, strict=True)))
    return whole


def moment_matrix(observation: Factors, block: Block) -> Tensor:
    """B (x) A of every layer of a block in flat coordinates, (n, n); nothing between layers."""
    owners: dict[str, list[Parameter]] = {}
    for p in block.parameters:
        owners.setdefault(p.owner, []).append(p)
    pieces = []
    for owner, params in owners.items():
        flat = Block(
            owner, tuple(params), {n: layer for n, layer in block.layers.items() if any(n == u for p in params for u, _ in p.uses)}
        )
        transposed = flat.layers[owner].rule.joint and flat.layers[owner].rule.input_first
        table = replace(flat, rows=params[0].shape[1 if transposed else 0], transposed=transposed)
        pair = moments(observation, table)
        if pair is None:  # not called in this step
            pieces.append(torch.zeros(flat.n, flat.n, dtype=_dtype(flat), device=observation.weight.device))
            continue
        start = params[0].start
        order = table.positions() - start
        dense = torch.zeros(flat.n, flat.n, dtype=pair[0].dtype, device=pair[0].device)
        dense[order.unsqueeze(1), order] = _product(*pair)
        pieces.append(dense)
    whole: Tensor = torch.block_diag(*pieces)
    return whole
