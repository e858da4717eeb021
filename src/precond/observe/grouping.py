"""Calls of layers, grouped by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from precond.observe.observation import LayerColumns


def by_layer(columns: Sequence[LayerColumns]) -> dict[str, tuple[LayerColumns, ...]]:
    """Calls grouped by layer; one that nothing came back to carries no columns and is left out."""
    grouped: dict[str, list[LayerColumns]] = defaultdict(list)
    for call in columns:
        if any(g is not None for g in call.grads):
            grouped[call.name].append(call)
    return {name: tuple(calls) for name, calls in grouped.items()}
