"""The collectives: sums over ranks, in one bucket a dtype. The plan decides their sequence, data never does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Group:
    """The ranks that share a model; a single process where there is no DistributedDataParallel."""

    def __init__(self, model: nn.Module) -> None:
        self._group: Any = model.process_group if isinstance(model, DistributedDataParallel) else None
        self.size: int = dist.get_world_size(self._group) if self._group is not None else 1
        self.rank: int = dist.get_rank(self._group) if self._group is not None else 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks; every rank must pass tensors of the same shapes in the same order."""
        if not self.several:
            return list(tensors)
        out: list[Tensor] = list(tensors)
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            members = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            bucket = torch.cat([tensors[i].reshape(-1) for i in members])
            dist.all_reduce(bucket, group=self._group)
            for i, piece in zip(members, bucket.split([tensors[i].numel() for i in members]), strict=True):
                out[i] = piece.view(tensors[i].shape)
        return out


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside DistributedDataParallel or torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
