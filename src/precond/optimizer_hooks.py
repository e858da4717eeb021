"""The optimizer's side: rewrite p.grad before its update, whether or not it has a closure, and clean up after it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from precond.errors import UsageError
from precond.observe import Again, Handles, number
from precond.search import Update

if TYPE_CHECKING:
    from precond.preconditioner import Preconditioner


class OptimizerHooks:
    """Hooks on `optimizer.step`. The optimizer keeps the preconditioner alive; the preconditioner does not keep the optimizer."""

    def __init__(self, preconditioner: Preconditioner, optimizer: torch.optim.Optimizer) -> None:
        self._preconditioner = preconditioner
        self._optimizer = weakref.ref(optimizer)
        self._rewritten = False
        self._update: Update | None = None
        self._handles = Handles([optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)])

    def optimizer(self) -> torch.optim.Optimizer | None:
        return self._optimizer()

    def remove(self) -> None:
        self._handles.remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Torch calls this before the closure, which refills p.grad: then the work is done inside the closure."""
        self._rewritten, self._update = False, None
        positional = len(args) > 1  # args[0] is the optimizer itself
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            if (names := self._preconditioner.searches()) != "":
                raise UsageError(f"{names} evaluates the loss again after the update: call optimizer.step(closure).")
            self._rewrite(optimizer)
            return None
        wrapped = self._wrap(optimizer, closure)
        if positional:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _wrap(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            if self._rewritten:
                raise UsageError(
                    f"{type(optimizer).__name__} evaluates its closure several times a step, so no gradient of it is the step's: use an "
                    "optimizer that takes one gradient a step, such as torch.optim.SGD."
                )
            params = [p for group in optimizer.param_groups for p in group["params"]]
            again = Again(closure, self._preconditioner.model, params) if self._preconditioner.searches() else None
            with torch.enable_grad():
                loss = closure()
            if again is not None:
                self._update = Update(number(loss), again, params)
            self._rewrite(optimizer)
            return loss

        return evaluate

    def _rewrite(self, optimizer: torch.optim.Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf > 0):
            self._preconditioner.abandon()  # the fused kernel will skip this update too
            return
        self._rewritten = self._preconditioner.rewrite(getattr(optimizer, "grad_scale", None))

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rewritten:
            self._preconditioner.hear()  # of the update as it was made, whatever stays of it
            if self._update is not None:
                self._preconditioner.decide(self._update)
            self._preconditioner.end_step()
        self._rewritten, self._update = False, None
