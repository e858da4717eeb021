"""What the outputs of an `nn.EmbeddingBag` are made of, by entry; pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def entries(
    weight: Tensor, index: Tensor, offsets: Tensor | None, weights: Tensor | None, *, mode: str, padding_idx: int | None, last_offset: bool, bags: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(index (E,), bag (E,), share (E, 1 or width)) of every entry of every bag: what of the bag's output it is the source of.

    So output b is the sum over entries of bag b of share * weight[index]. Entries of `padding_idx` are in no bag. Of a maximum each coordinate
    belongs to the first of its largest entries.

    >>> index, bag, share = entries(torch.eye(2), torch.tensor([[0, 1, 1]]), None, None, mode="mean", padding_idx=0, last_offset=False, bags=1)
    >>> index.tolist(), bag.tolist(), share.flatten().tolist()
    ([1, 1], [0, 0], [0.5, 0.5])
    """
    if index.dim() == 2:
        owner = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
    else:
        assert offsets is not None
        starts = offsets[:-1] if last_offset else offsets
        places = torch.arange(len(index), device=index.device, dtype=starts.dtype)
        owner = torch.searchsorted(starts, places, right=True) - 1
    index = index.reshape(-1)
    kept = torch.ones_like(index, dtype=torch.bool) if padding_idx is None else index != padding_idx
    index, owner = index[kept], owner[kept]
    if mode == "max":
        return index, owner, _largest(weight.detach(), index, owner, bags)
    share = weight.new_ones(len(index)) if weights is None else weights.reshape(-1)[kept]
    if mode == "mean":
        share = share / torch.bincount(owner, minlength=bags)[owner]
    return index, owner, share.unsqueeze(1)


def _largest(weight: Tensor, index: Tensor, owner: Tensor, bags: int) -> Tensor:
    """(E, width): 1 at the first largest entry of each bag, as torch chooses it."""
    rows = weight[index]
    bag = owner[:, None].expand_as(rows)
    top = rows.new_full((bags, rows.shape[1]), -torch.inf).scatter_reduce(0, bag, rows, "amax")
    place = torch.arange(len(index), device=index.device)[:, None].expand_as(rows)
    among = torch.where(rows == top[owner], place, len(index))
    first = torch.full_like(top, len(index), dtype=torch.long).scatter_reduce(0, bag, among, "amin")
    return (place == first[owner]).to(weight.dtype)
