"""From gradients to directions: gather by block, transform, apply, and let nothing through that is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond import numerics
from precond.blockstate import BlockState
from precond.diagnostics import Diagnostics
from precond.errors import SolverFailure
from precond.observe import Tensors
from precond.options import OnNonfinite
from precond.transforms import Scene, Transform

Transforms = Sequence[tuple[Transform, dict[str, Any]]]
"""Each with its state."""


@dataclass(frozen=True)
class Vectors:
    """By block, for the blocks that have a gradient in this step: the raw gradient, and what is preconditioned."""

    raw: Tensors
    moved: Tensors

    def by_parameter(self, blocks: Sequence[BlockState]) -> Tensors:
        """What is preconditioned, by parameter."""
        return {n: v for b in blocks if b.name in self.moved for n, v in b.plan.block.scatter(self.moved[b.name]).items()}


def gathered(blocks: Sequence[BlockState], gradients: Tensors, transforms: Transforms) -> Vectors:
    """The vectors of a step."""
    raw = {b.name: b.plan.block.gather(_filled(b, gradients)) for b in blocks if any(n in gradients for n in b.plan.block.names)}
    moved = raw
    for transform, state in transforms:
        moved = transform.before(moved, state)
    return Vectors(raw, moved)


def directions(
    blocks: Sequence[BlockState], vectors: Vectors, transforms: Transforms, rates: Mapping[str, float], started: bool, diagnostics: Diagnostics
) -> Tensors:
    """Directions by block. started: whether the preconditioner is applied yet; before, the direction is the transformed gradient."""
    raw, moved = vectors.raw, vectors.moved
    found = {b.name: _apply(b, moved[b.name], diagnostics) if started else moved[b.name] for b in blocks if b.name in raw}
    tilings = {b.name: b.plan.block.tiling for b in blocks if b.plan.block.tiling is not None}
    scene = Scene(raw, rates, started, tilings, {b.name: b.plan.block.shape for b in blocks})
    for transform, state in transforms:
        found = transform.after(moved, found, state, scene)
    return found


def _filled(block: BlockState, gradients: Tensors) -> Tensors:
    """The gradients of a block's parameters, zeros for those that have none in this step."""
    names = block.plan.block.names
    if all(n in gradients for n in names):
        return gradients
    like = next(gradients[n] for n in names if n in gradients)
    return {p.name: gradients[p.name] if p.name in gradients else like.new_zeros(p.shape) for p in block.plan.block.parameters}


def _apply(block: BlockState, vector: Tensor, diagnostics: Diagnostics) -> Tensor:
    try:
        return block.apply(vector)
    except SolverFailure:  # a solve that broke down: this block does not move in this step
        diagnostics.count("solves_failed", block=block.name)
        return torch.zeros_like(vector)


def finite_only(
    blocks: Sequence[BlockState], found: Tensors, raw: Tensors, on_nonfinite: OnNonfinite, step: int, diagnostics: Diagnostics
) -> Tensors | None:
    """Directions by parameter, zero for a block that is not finite; None where the whole step is to be skipped."""
    # a square that overflows is as good as infinite: such a step would leave parameters whose next loss is none
    flags = {name: numerics.all_finite([raw[name].norm(), direction.norm()]) for name, direction in found.items()}  # NaN and inf stay in a norm
    for b in blocks:
        if b.name in flags:
            b.settle(flags[b.name])
    if on_nonfinite != "zero" and flags and not bool(torch.stack(list(flags.values())).all()):
        bad = ", ".join(name for name, flag in flags.items() if not bool(flag))
        if on_nonfinite == "raise":
            raise FloatingPointError(f"the gradient or direction of {bad} is not finite at step {step}.")
        diagnostics.count("steps_skipped", block=bad)
        return None
    out: Tensors = {}
    for b in blocks:
        if b.name in found:
            diagnostics.count("directions_zeroed", ~flags[b.name], b.name)
            out.update(b.plan.block.scatter(numerics.where_valid(flags[b.name], found[b.name])))
    return out
