"""State in and out: tensors and numbers only, by canonical names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precond.blockstate import BlockState
from precond.errors import UsageError
from precond.progress import Progress

VERSION = 1


def save(progress: Progress, blocks: Sequence[BlockState]) -> dict[str, Any]:
    """A snapshot that `torch.load(weights_only=True)` reads; its tensors are never changed in place."""
    return {
        "version": VERSION, "step": progress.step, "seed": progress.seed, "counters": dict(progress.diagnostics),
        "blocks": {
            b.name: {"holds": _holds(b), "statistics": dict(b.statistics), "state": _copied(b.state, None), "failures": b.failures,
                "damping": dict(b.level)} for b in blocks
        },
        "transforms": _copied(progress.transforms, None),
    }  # fmt: skip


def load(state: Mapping[str, Any], progress: Progress, blocks: Sequence[BlockState], device: torch.device) -> None:
    """Continue from a saved state; raises one sentence where it does not fit."""
    if not {"step", "seed", "counters", "blocks", "transforms"} <= set(state):
        raise UsageError("this is no state of a preconditioner: give load_state_dict() what state_dict() returned.")
    saved = state["blocks"]
    if set(saved) != {b.name for b in blocks}:
        odd = sorted(set(saved) ^ {b.name for b in blocks})
        raise UsageError(f"the saved state belongs to another model or triple: it and this preconditioner differ in the blocks {', '.join(odd)}.")
    for b in blocks:
        if saved[b.name]["holds"] != _holds(b):
            raise UsageError(
                f"the saved state belongs to another model or triple: its block {b.name!r} is {saved[b.name]['holds']}, here it is {_holds(b)}."
            )
    if len(state["transforms"]) != len(progress.transforms):
        raise UsageError(f"the saved state has {len(state['transforms'])} transforms, this preconditioner {len(progress.transforms)}.")
    progress.step, progress.seed = int(state["step"]), int(state["seed"])
    progress.diagnostics.load(state["counters"])
    progress.transforms[:] = [_copied(s, device) for s in state["transforms"]]
    for b in blocks:
        entry = saved[b.name]
        b.statistics, b.state, b.failures = _copied(entry["statistics"], device), _copied(entry["state"], device), int(entry["failures"])
        b.level = _copied(entry.get("damping", {}), device)


def _copied(tree: Any, device: torch.device | None) -> Any:
    """New containers, with copies of the tensors on a device; without one, the same tensors."""
    if isinstance(tree, Tensor):
        return tree.detach() if device is None else tree.detach().to(device, copy=True)
    if isinstance(tree, Mapping):
        return {key: _copied(value, device) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_copied(value, device) for value in tree]
    return tree


def _holds(block: BlockState) -> str:
    """What a saved block must be to fit: its cell and its parameters."""
    shapes = ", ".join(f"{p.name} {'x'.join(map(str, p.shape))}" for p in block.plan.block.parameters)
    return f"{block.plan.triple} of {shapes}"
