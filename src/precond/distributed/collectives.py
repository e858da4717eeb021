"""The collectives: sums over ranks and concatenations, in one bucket a dtype. The plan decides their sequence, data never does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from precond.errors import ObservationError


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

    def concatenate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all ranks, in the order of the ranks; every rank must pass tensors of the same names, in as many dimensions.

        Two collectives, and one more a dtype: ranks may have different numbers of rows, and get them all.

        Raises:
            ObservationError: rows of the ranks differ in anything but their number; on all ranks alike.
        """
        if not self.several or not tensors:
            return dict(tensors)
        names = list(tensors)
        mine = torch.tensor(
            [size for t in tensors.values() for size in t.shape], dtype=torch.int64, device=next(iter(tensors.values())).device
        )
        shapes = [self._split_shapes(found.tolist(), tensors) for found in self._all(mine)]
        for name in names:
            ends = {shape[name][1:] for shape in shapes if shape[name][0]}
            if len(ends) > 1:
                raise ObservationError(
                    f"the ranks hold rows {name!r} of different shapes, {sorted(ends)}, which cannot stand in one matrix: give the batches of a step "
                    "the same length on all ranks, or use a representation without rows, such as 'kron_io'."
                )
        out: dict[str, Tensor] = {}
        for dtype in sorted({t.dtype for t in tensors.values()}, key=str):
            members = [name for name in names if tensors[name].dtype == dtype]
            sizes = [sum(math.prod(shape[name]) for name in members) for shape in shapes]
            bucket = torch.cat([tensors[name].reshape(-1) for name in members])
            found = self._all(torch.nn.functional.pad(bucket, (0, max(sizes) - len(bucket))))
            pieces = [
                dict(zip(members, b[:size].split([math.prod(shape[name]) for name in members]), strict=True))
                for b, size, shape in zip(found, sizes, shapes, strict=True)
            ]
            for name in members:
                parts = [p[name].view(shape[name]) for p, shape in zip(pieces, shapes, strict=True) if shape[name][0]]
                out[name] = torch.cat(parts) if parts else tensors[name]
        return out

    def _all(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self._group)
        return found

    @staticmethod
    def _split_shapes(sizes: list[int], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        left = iter(sizes)
        return {name: tuple(next(left) for _ in t.shape) for name, t in tensors.items()}


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside DistributedDataParallel or torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
