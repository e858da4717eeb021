"""Which entries of a block a sparse representation keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.blocks import Block
from precond.operators.sparse_precision import NONE

Form = Literal["precision", "masked"]
Preset = Literal["bias", "unit", "band", "diagonal"]
Pattern = Preset | Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Layout:
    """Entries of a symmetric (n, n) matrix, the whole diagonal first.

    pairs: (2, m), row > column, each once, in the order of the rows. parents: (n, k), absent ones -1, and places: (n, k + 1, k + 1), where
    each entry of the sub-block on (i, pa(i)) stands among the n + m entries; None where no graph is asked for.
    """

    n: int
    pairs: Tensor
    parents: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: torch.device) -> Layout:
        return Layout(self.n, self.pairs.to(device), *(None if t is None else t.to(device) for t in (self.parents, self.places)))


def check(pattern: Pattern, form: Form, width: int) -> None:
    """Raise `ValueError`, in one sentence, for a pattern that has no meaning whatever the block."""
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: choose one of {', '.join(map(repr, get_args(Form)))}.")
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"width={width!r}: a band reaches at least one coordinate.")
    if isinstance(pattern, str):
        if pattern not in get_args(Preset):
            raise ValueError(f"pattern={pattern!r}: choose one of {', '.join(map(repr, get_args(Preset)))}, or give your own.")
    elif form == "precision":
        _refuse_cycles(_table(pattern))
    else:
        _given_pairs(pattern)


def layout(pattern: Pattern, form: Form, width: int, block: Block) -> Layout:
    """The entries of a block; raises `ValueError` where a pattern of the user's own is of another size."""
    if isinstance(pattern, str):
        parents = _preset(pattern, width, block)
    elif form == "precision":
        parents = _table(pattern)
        if len(parents) != block.n:
            raise ValueError(f"the graph gives parents of {len(parents)} coordinates, and there are {block.n}: give a list for each.")
    else:
        pairs, size = _given_pairs(pattern)
        if size > block.n or (_is_mask(pattern) and size != block.n):
            raise ValueError(
                f"the pattern is one of {size} coordinates or more, and there are {block.n}: give a mask ({block.n}, {block.n}) or pairs below."
            )
        return _masked(pairs, block.n)
    if form == "precision":
        return _cliques(parents)
    child = torch.arange(block.n).unsqueeze(1).expand_as(parents)[parents != NONE]
    return _masked(torch.stack([child, parents[parents != NONE]]), block.n)


def _preset(name: Preset, width: int, block: Block) -> Tensor:
    """Parents (n, k) in the flat coordinates of a block."""
    n = block.n
    if name == "band":
        back = torch.arange(n).unsqueeze(1) - torch.arange(1, min(width, n - 1) + 1)
        return back.clamp(min=NONE)
    if name == "diagonal":
        return torch.empty(n, 0, dtype=torch.long)
    tables = []
    order = block.positions()  # ascending: parameters are in the model's order
    for matrix in block.matrices():
        if name == "unit" or matrix.homogeneous:
            tables.append(torch.searchsorted(order, matrix.positions()).view(matrix.shape if matrix.rows is not None else (1, -1)))
    k = max((1 if name == "bias" else table.shape[1] - 1 for table in tables), default=0)
    parents = torch.full((n, k), NONE)
    for table in tables:
        if name == "bias":
            parents[table[:, :-1].flatten(), 0] = table[:, -1:].expand(-1, table.shape[1] - 1).flatten()
        else:
            for place in range(1, table.shape[1]):
                parents[table[:, place], :place] = table[:, :place]
    return parents


def _table(graph: Pattern) -> Tensor:
    """A user's graph as parents (n, k)."""
    if isinstance(graph, Tensor):
        if graph.dim() != 2 or graph.is_floating_point() or graph.dtype == torch.bool:
            raise ValueError(
                f"form='precision' takes parents (n, k) of integers, absent ones -1, not {graph.dtype} of shape {tuple(graph.shape)}."
            )
        table = graph.long().cpu()
    else:
        k = max((len(parents) for parents in graph), default=0)
        table = torch.tensor([[*parents, *[NONE] * (k - len(parents))] for parents in graph], dtype=torch.long).reshape(len(graph), k)
    if table.numel() and (int(table.min()) < NONE or int(table.max()) >= len(table)):
        raise ValueError(
            f"a graph of {len(table)} coordinates has parents 0 to {len(table) - 1}, not {int(table.min())} to {int(table.max())}."
        )
    ordered = table.sort(1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NONE)).any()):
        raise ValueError("a graph has each parent of a coordinate once: remove the repeated ones.")
    return table


def _refuse_cycles(parents: Tensor) -> None:
    graph = {i: [j for j in above if j != NONE] for i, above in enumerate(parents.tolist())}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise ValueError(f"the parents form a cycle, {' <- '.join(map(str, error.args[1]))}: leave out one of its edges.") from None


def _is_mask(pattern: Pattern) -> bool:
    return isinstance(pattern, Tensor) and pattern.dtype == torch.bool


def _given_pairs(pattern: Pattern) -> tuple[Tensor, int]:
    """(pairs (2, m), the number of coordinates that they need) of a user's mask or pairs."""
    if not isinstance(pattern, Tensor) or pattern.dim() != 2 or pattern.is_floating_point():
        raise ValueError(
            "form='masked' takes a boolean mask (n, n) or pairs of indices (2, m), as a tensor; a graph of parents needs form='precision'."
        )
    pattern = pattern.cpu()
    if _is_mask(pattern):
        if pattern.shape[0] != pattern.shape[1] or not torch.equal(pattern, pattern.T):
            raise ValueError(
                f"a mask is a symmetric matrix of booleans, and this one of shape {tuple(pattern.shape)} is not: use mask | mask.T."
            )
        return pattern.nonzero().T, len(pattern)
    if pattern.shape[0] != 2 or (pattern.numel() and int(pattern.min()) < 0):
        raise ValueError(
            f"pairs of indices are two rows of row and column numbers from 0, (2, m), not a tensor of shape {tuple(pattern.shape)}."
        )
    return pattern.long(), int(pattern.max()) + 1 if pattern.numel() else 0


def _masked(pairs: Tensor, n: int) -> Layout:
    high, low = pairs.amax(0), pairs.amin(0)
    keys = (high * n + low)[high != low].unique()
    return Layout(n, torch.stack([keys // n, keys % n]))


def _cliques(parents: Tensor) -> Layout:
    """All pairs within each {i} + pa(i)."""
    n = len(parents)
    own = torch.cat([torch.arange(n).unsqueeze(1), parents], 1)
    one, other = own.unsqueeze(2), own.unsqueeze(1)
    high, low = torch.maximum(one, other), torch.minimum(one, other)
    off = (high != low) & (low != NONE)
    keys, where = (high * n + low)[off].unique(return_inverse=True)
    places = torch.where(high == low, high.clamp(min=0), 0)
    places[off] = n + where
    return Layout(n, torch.stack([keys // n, keys % n]), parents, places)
