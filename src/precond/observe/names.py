"""Canonical parameter and module names: those of the plain model, whatever wraps it."""

from __future__ import annotations

_WRAPPERS = frozenset({"module", "_orig_mod"})


def canonical(name: str) -> str:
    """`name` without the parts that DistributedDataParallel and torch.compile put into it.

    >>> canonical("module._orig_mod.layer.weight")
    'layer.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
