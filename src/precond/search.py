"""How much of the optimizer's update stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from precond.diagnostics import Diagnostics
from precond.distributed import Group
from precond.observe import Again
from precond.transforms import Transform


class Update:
    """An update of the optimizer, made from where the parameters are now, that may be taken back after it."""

    def __init__(self, loss: Tensor, again: Again, params: Sequence[nn.Parameter]) -> None:
        self._loss, self._again = loss, again
        self._params = [p for p in params if p.grad is not None]
        self._start = [p.detach().clone() for p in self._params]
        self._gradients = [p.grad.detach().clone() for p in self._params if p.grad is not None]

    @torch.no_grad()
    def decide(self, transforms: Sequence[Transform], group: Group, diagnostics: Diagnostics) -> None:
        """Let every transform that searches choose a fraction, one after another, and leave the parameters there."""
        end = [p.detach().clone() for p in self._params]
        slope = torch.stack(
            [((e - s).double() * g.double()).sum() for s, e, g in zip(self._start, end, self._gradients, strict=True)]
        ).sum()

        def place(t: float) -> None:
            for p, s, e in zip(self._params, self._start, end, strict=True):
                p.copy_(s if t == 0 else e if t == 1 else s + t * (e - s))

        def evaluate(t: float) -> float:
            place(t)
            return _mean(self._again(), group)

        kept, loss, along = 1.0, _mean(self._loss, group), float(slope)
        for transform in transforms:
            if transform.searches and kept:
                kept *= transform.fraction(loss, kept * along, lambda t, done=kept: evaluate(done * t))  # type: ignore[misc]
        place(kept)
        if kept != 1:
            diagnostics.count("steps_shortened" if kept else "steps_rejected")


def _mean(loss: Tensor, group: Group) -> float:
    return float(group.sum([loss / group.size])[0])
