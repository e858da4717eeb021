"""The builder: three axes wired to a model, its criteria and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from precond import likelihoods, saving
from precond.auto import Auto
from precond.blockstate import BlockState
from precond.damping import Amount, Damping
from precond.description import Description, describe
from precond.diagnostics import Diagnostics
from precond.distributed import Group, unwrap
from precond.errors import UsageError
from precond.history import History
from precond.likelihoods import Likelihood
from precond.matrices import Matrix
from precond.observe import LossReader
from precond.operators import Operator
from precond.optimizer_hooks import OptimizerHooks
from precond.options import BeforeStart, Interval, LossWeights, OnNonfinite, make_options
from precond.planning import Overrides
from precond.progress import Progress
from precond.representations import Representation
from precond.search import Update
from precond.session import Session
from precond.solvers import Solver
from precond.transforms import Transform
from precond.triple import Triple

Criterion = nn.Module | Likelihood | LossReader | str


class Preconditioner:
    """Rewrites p.grad to (C + damping)^(-power) p.grad, C = a matrix, in a representation, inverted by a solver.

    Args:
        matrix, repr, solver: a name, or an instance with options of its own. An invalid cell raises here. repr="auto", or
            `precond.Auto(budget=...)`, chooses by layer what a budget of memory allows.
        damping: a number, or an object of `precond.damping`.
        transforms: objects of `precond.transforms`, applied around the preconditioner in order.
        history: "local" (this step alone), the weight of the old value in a bias-corrected average, or an object of
            `precond.history`.
        curvature_interval: observe every so many steps, or when a function of the step says so.
        solver_interval: refresh the solver so often; as often as the curvature is observed when None.
        start_step: steps before the first preconditioned update; statistics are gathered from step 0.
        before_start: what those steps do: the update with the plain (transformed) gradient, or "nothing": no parameter moves and no
            transform sees the gradient, as in the first step of SOAP.
        overrides: module-name glob, class or module -> dict(matrix=, repr=, solver=, damping=), or None to leave it.
        strict: raise where the representation cannot host a layer, instead of the fallback that `describe()` shows.
        loss_weights: "normalised": C = sum w_c C_c / sum w_c over the criterion calls of the step; "given": sum w_c C_c.
        on_nonfinite: a block with a gradient or direction that is not finite gets a zero direction ("zero", no host
            synchronisation), the whole step is skipped ("skip"), or it raises ("raise").
        seed: keys sampled labels; part of the state. Drawn from torch's generator when None.
        rows: module-name glob -> how a layer's leading dimension is made where it is not the batch: "flattened" (batch and positions),
            "second" (the batch is the second one), "shared" (a position embedding, called once for all examples).
        self_check: compare the first gradient of every block with what its layers explain, and raise when they differ.

    Raises:
        UnknownName: a name in no registry. InvalidCombination: a cell without meaning, with the nearest valid one.

    >>> model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> preconditioner = Preconditioner(matrix="fisher_mc", repr="kron_io", solver="cholesky", damping=1e-2)
    >>> _ = preconditioner.attach(model, criterion, optimizer)
    >>> criterion(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
    >>> optimizer.step()
    >>> preconditioner.diagnostics["refreshes"]
    1
    """

    def __init__(
        self, *, matrix: str | Matrix | type[Matrix], repr: str | Representation | type[Representation] | Auto,
        solver: str | Solver | type[Solver], damping: Amount | Damping = 1e-3, transforms: Sequence[Transform] | None = None,
        history: str | float | History = "local", curvature_interval: Interval = 1, solver_interval: Interval | None = None,
        start_step: int = 0, before_start: BeforeStart = "gradient", overrides: Overrides | None = None, strict: bool = False,
        loss_weights: LossWeights = "normalised", on_nonfinite: OnNonfinite = "zero", seed: int | None = None,
        rows: Mapping[str, str] | None = None, self_check: bool = True,
    ) -> None:  # fmt: skip
        self.triple = Triple.make(matrix, repr, solver, damping)
        kind = self.triple.check()
        self.options = make_options(
            self.triple.repr.over(kind), self.triple.solver, kind, transforms=transforms, history=history,
            curvature_interval=curvature_interval, solver_interval=solver_interval, start_step=start_step, before_start=before_start,
            overrides=overrides, strict=strict,
            loss_weights=loss_weights, on_nonfinite=on_nonfinite, rows=rows,
            self_check=self_check,
        )  # fmt: skip
        drawn = int(torch.randint(2**31, ()).item()) if seed is None else seed
        self._progress = Progress(drawn, [{} for _ in self.options.transforms])
        self._session: Session | None = None
        self._blocks: list[BlockState] = []  # of the last binding: readable after `remove`, continued by another `attach`
        self._hooks: OptimizerHooks | None = None
        self._pending: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int:
        """Keys all draws; part of the state."""
        return self._progress.seed

    @property
    def diagnostics(self) -> Diagnostics:
        """Counters: refreshes, retries by rung, blocks kept at their last good state, directions zeroed, steps skipped."""
        return self._progress.diagnostics

    # -- binding -------------------------------------------------------------------------------------------------

    def attach(
        self, model: nn.Module, criterion: Criterion | Sequence[Criterion] | None = None,
        optimizer: torch.optim.Optimizer | None = None, *, scaler: torch.amp.GradScaler | None = None,
    ) -> Self:  # fmt: skip
        """Bind to a model: hooks only, nothing of it is changed.

        criterion: a loss module, a likelihood, a name (then call `observe`), or a list of them. optimizer: its `step` calls
        ours, and parameters that it does not hold are left alone; without one, call `step()` in the loop. scaler: AMP's,
        needed only by loss_weights="given".
        """
        if self._session is not None:
            raise UsageError("this preconditioner is attached already: call remove() first, or build another one.")
        criteria = [(c, None if isinstance(c, LossReader) else likelihoods.resolve(c)) for c in _criteria(criterion)]
        try:
            self._hooks = OptimizerHooks(self, optimizer) if optimizer is not None else None
            self._session = Session(
                self.triple, self.options, self._progress, unwrap(model), Group(model), criteria,
                held=self._held, setting=self._setting, amp_scale=(lambda: float(scaler.get_scale())) if scaler is not None else lambda: 1.0,
                blocks=self._blocks,
            )  # fmt: skip
            if not criteria and self._session.needs_criterion:
                raise UsageError(
                    f"the matrix {self.triple.matrix.name!r} is made of the criterion's calls: pass it, attach(model, criterion, optimizer), or a "
                    f"name ({', '.join(likelihoods.REGISTRY.names())}) and call observe(loss, output, target) in the loop."
                )
            if self._pending is not None:
                self.load_state_dict(self._pending)
        except BaseException:
            self.remove()
            raise
        return self

    def _held(self) -> frozenset[int] | None:
        optimizer = self._hooks.optimizer() if self._hooks is not None else None
        return None if optimizer is None else frozenset(id(p) for group in optimizer.param_groups for p in group["params"])

    def _setting(self, parameter: nn.Parameter, name: str, default: float) -> float:
        """What the optimizer has for the parameter's group, such as "lr"; the default where it has none, or no optimizer is attached."""
        optimizer = self._hooks.optimizer() if self._hooks is not None else None
        for group in optimizer.param_groups if optimizer is not None else ():
            if any(p is parameter for p in group["params"]):
                return float(group.get(name, default))
        return default

    def remove(self) -> None:
        """Leave no hook behind; the statistics stay readable, and another `attach` goes on with them."""
        if self._session is not None:
            self._session.observer.remove()
            self._blocks = self._session.blocks
        if self._hooks is not None:
            self._hooks.remove()
        self._session = self._hooks = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def observe(self, loss: Tensor, output: Tensor, target: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Watch a loss that no criterion module computed; call it before `loss.backward()`. Returns the loss."""
        session = self._attached()
        likelihood = session.criteria[0][1] if session.criteria else None
        if likelihood is None:
            raise UsageError("observe() needs to know what the loss stands for: attach(model, criterion=...) with a likelihood or its name.")
        if session.needs_criterion and torch.is_grad_enabled() and loss.requires_grad and session.due():
            if not session.observer.observe(loss, output, target, likelihood):
                raise UsageError("observe() was given an output that no forward pass of the attached model made in this step.")
        return loss

    def _attached(self) -> Session:
        if self._session is None:
            raise UsageError("this preconditioner is not attached: call attach(model, criterion, optimizer) first.")
        return self._session

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Rewrite p.grad now. Called by the optimizer's `step` where one is attached, else by the loop."""
        session = self._attached()
        if self.searches():
            raise UsageError(f"{self.searches()} evaluates the loss again after the update: attach the optimizer and call optimizer.step(closure).")
        if not session.rewrite(scale=None):
            raise UsageError("no parameter has a gradient: call loss.backward() before step().")
        session.end_step()

    def rewrite(self, scale: Tensor | None) -> bool:
        """`step` without its end, for the optimizer's hook; `scale`: AMP's, where a fused optimizer unscales inside its kernel."""
        return self._attached().rewrite(scale)

    def hear(self) -> None:
        """Tell what follows the loss what the optimizer's update did to it."""
        self._attached().hear()

    def searches(self) -> str:
        """The names of the transforms that need a closure."""
        return ", ".join(type(t).__name__ for t in self.options.transforms if t.searches)

    @property
    def model(self) -> nn.Module:
        """The model that it is attached to, unwrapped."""
        return self._attached().model

    def decide(self, update: Update) -> None:
        """How much of an update stays."""
        update.decide(self.options.transforms, self._attached().group, self.diagnostics)

    def end_step(self) -> None:
        """Clear what belongs to the step, after the optimizer's update."""
        self._attached().end_step()

    def abandon(self) -> None:
        """Forget the observations of a step whose update will not be made."""
        self._attached().observer.forget()

    # -- reading and saving --------------------------------------------------------------------------------------

    @property
    def operators(self) -> dict[str, Operator]:
        """Block name -> the operator of the present statistics; matrix-free ones live only within a step."""
        return {b.name: b.operator() for b in self._known() if b.measured()}

    def operator(self, block: str | None = None, *, damped: bool = False) -> Operator:
        """The operator of a block, by name (needed where there are several); damped: as it was at the block's last refresh."""
        found = {b.name: b for b in self._known()}
        name = next(iter(found)) if block is None and len(found) == 1 else block
        if name not in found:
            raise UsageError(f"there is no block {name!r}: the blocks are {', '.join(map(repr, found)) or 'made by attach()'}.")
        state = found[name]
        if not state.measured():
            raise UsageError(
                f"block {name!r} holds no operator: nothing was observed yet, or it is matrix-free and lives within a step; of one batch, "
                "precond.curvature(...) gives any."
            )
        return state.plan.solver.damped(state.operator(), state.damping or state.plan.damping.at()) if damped else state.operator()

    def _known(self) -> list[BlockState]:
        return self._blocks if self._session is None else self._session.blocks

    def describe(self) -> Description:
        """A table: every trainable parameter, its block, its triple, damping, bytes held, and why it has none."""
        session = self._attached()
        return describe(session.plan, session.blocks)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, by canonical names: `torch.load(weights_only=True)` reads it."""
        return saving.save(self._progress, self._known())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, before or after `attach`; raises where it belongs to another model or triple."""
        if self._session is None:
            self._pending = dict(state)
            return
        self._pending = None
        saving.load(state, self._progress, self._session.blocks, next(self._session.model.parameters()).device)


def _criteria(criterion: Criterion | Sequence[Criterion] | None) -> list[Criterion]:
    if criterion is None:
        return []
    if isinstance(criterion, (str, nn.Module, Likelihood, LossReader)) or not isinstance(criterion, Sequence):
        return [criterion]
    return list(criterion)
