"""The first-observation self-check: rebuild every parameter's gradient from the (a, g) of its layers and compare.

What is silently wrong in other libraries shows here: a weight used functionally, a tie that was missed, a wrong
layout, an auxiliary loss the criterion does not see, a double count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.observe.catch import GradientCatch
from precond.observe.guard import own_pass
from precond.observe.names import canonical
from precond.observe.observation import LayerColumns
from precond.observe.passes import nested_columns
from precond.observe.records import CriterionCall
from precond.observe.trees import tensors_in
from precond.observe.truth import true_columns

Rebuild = Callable[[LayerColumns], Mapping[str, Tensor]]


class SelfCheck:
    """Checks one backward pass, then rests.

    rebuild: from the true gradient at one layer call to the gradient of each of the layer's parameters, by name.
    """

    def __init__(self, rebuild: Rebuild, names: Mapping[str, str]) -> None:
        self.rebuild, self.names = rebuild, dict(names)  # parameter -> the block it belongs to
        self.pending = True
        self._catch = GradientCatch(self.names)

    def begin(self, model: nn.Module) -> None:
        """Catch the raw gradient of each parameter in this pass."""
        self._catch.begin(model)

    def end(self, parts: Sequence[CriterionCall], backward: int, accumulated: bool, layers: frozenset[str]) -> None:
        """Compare, if the pass accumulated into p.grad; raises with the name of the first block that differs."""
        seen = self._catch.end()
        if not accumulated or not parts:
            return
        self.pending = False
        unit = torch.ones((), dtype=torch.float64)
        found: list[tuple[LayerColumns, list[torch.dtype]]] = []
        for forward in {id(p.forward): p.forward for p in parts}.values():
            calls = [c for c in forward.calls if c.name in layers]
            for recorded, call in zip(calls, true_columns(forward, backward, layers, unit), strict=True):
                found.append((call, [g.dtype for slot in recorded.slots for _, g in slot]))  # `true_columns` widens half precision
        self._compare(seen, found)

    def batch(self, part: CriterionCall, model: nn.Module, layers: frozenset[str]) -> None:
        """The same for a batch that has no backward pass, from one column of fixed random signs at the criterion's input."""
        self.pending = False
        generator = torch.Generator().manual_seed(0)
        signs = (2.0 * torch.randint(2, part.output.shape, generator=generator) - 1.0).to(part.output)
        params = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad and canonical(n) in self.names}
        with own_pass():
            true = torch.autograd.grad([part.output], list(params.values()), [signs], retain_graph=True, allow_unused=True)
            calls = nested_columns(part, signs.unsqueeze(0), layers)
        seen = {name: gradient.detach() for name, gradient in zip(params, true, strict=True) if gradient is not None}
        self._compare(seen, [(call, []) for call in calls])

    def _compare(self, seen: Mapping[str, Tensor], found: Sequence[tuple[LayerColumns, list[torch.dtype]]]) -> None:
        """True gradients with what the calls of the layers explain; each with the dtypes that its columns came in."""
        rebuilt: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        noise: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for call, raw in found:
            if any(g is not None for g in call.grads):
                for name, gradient in self.rebuild(call).items():
                    rebuilt[name] = rebuilt[name].to(gradient) + gradient
                    noise[name] = noise[name].to(gradient) + _rounding(call, raw)
        for name, block in self.names.items():
            if name in seen:
                _compare(name, block, seen[name], rebuilt[name], noise[name])


def _coarsest(call: LayerColumns, raw: Sequence[torch.dtype]) -> float:
    """The rounding unit of the least precise tensor the layer computed with (autocast)."""
    tensors = [t for t in (*tensors_in((call.args, dict(call.kwargs))), *call.grads) if t is not None and t.is_floating_point()]
    under_autocast = torch.is_autocast_enabled(tensors[0].device.type)
    dtypes = [*raw, *(t.dtype for t in tensors)] + ([torch.get_autocast_dtype(tensors[0].device.type)] if under_autocast else [])
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _rounding(call: LayerColumns, raw: Sequence[torch.dtype]) -> Tensor:
    """A bound for the rounding error of the sum over examples: what cancels in it (a bias before BatchNorm) is only noise."""
    inputs = [t.abs().max() for t in tensors_in((call.args, dict(call.kwargs))) if t.is_floating_point() and t.numel()]
    size = torch.stack([g.abs().sum() for g in call.grads if g is not None]).sum()
    eps = _coarsest(call, raw)
    return size * max(1.0, *(float(i) for i in inputs), 0.0) * (10 * eps if eps < 1e-3 else eps)


def _compare(name: str, block: str, gradient: Tensor, rebuilt: Tensor, noise: Tensor) -> None:
    """Differences beyond rounding mean that the layer does not explain the gradient."""
    wide = gradient.to(torch.float64)
    difference, size = (wide - rebuilt.to(torch.float64)).norm(), wide.norm()
    allowed = 100 * torch.finfo(gradient.dtype).eps ** 0.75 * size + noise.to(torch.float64)
    if bool(torch.isfinite(size)) and bool(torch.isfinite(difference)) and bool(difference > allowed):
        raise ObservationError(
            f"the gradient of {name!r} is not what the calls of its layer explain (relative difference {float(difference / size):.1e}), so "
            f"the curvature of block {block!r} would be wrong. Its weight is used outside the layer's forward, it is part of a loss that no "
            f"attached criterion computes, or the layer enumerates its examples in another order. Leave the block out with "
            f"overrides={{{block!r}: None}} (of curvature(): freeze it), attach every criterion, or pass self_check=False if the difference is meant."
        )
