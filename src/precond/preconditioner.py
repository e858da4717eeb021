"""The builder: three axes wired to a model, its criteria and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from precond import history as histories
from precond import likelihoods, numerics, schedule
from precond.blocks import Block, Partition
from precond.blockstate import BlockState
from precond.damping import Damping
from precond.description import Description, describe
from precond.diagnostics import Diagnostics
from precond.distributed import Group, unwrap
from precond.errors import InvalidCombination, SolverFailure, UsageError
from precond.history import History, Local
from precond.layers import ROW_LAYOUTS
from precond.likelihoods import Likelihood
from precond.matrices import REGISTRY as MATRICES
from precond.matrices import Matrix
from precond.observe import Observer, SelfCheck, Tensors
from precond.operators import Operator
from precond.optimizer_hooks import OptimizerHooks
from precond.plan import Overrides, Plan, Triple, make_plan
from precond.representations import REGISTRY as REPRESENTATIONS
from precond.representations import Representation
from precond.solvers import REGISTRY as SOLVERS
from precond.solvers import Solver
from precond.transforms import Transform
from precond.update import Assembly

Interval = int | Callable[[int], bool]
OnNonfinite = Literal["zero", "skip", "raise"]
Criterion = nn.Module | Likelihood | str
_FAILURE_LIMIT = 3


class Preconditioner:
    """Rewrites p.grad to (C + damping)^(-power) p.grad, C = a matrix, in a representation, inverted by a solver.

    Args:
        matrix, repr, solver: a name, or an instance with options of its own. An invalid cell raises here.
        damping: a number, or an object of `precond.damping`.
        transforms: objects of `precond.transforms`, applied around the preconditioner in order.
        history: "local" (this step alone), the weight of the old value in a bias-corrected average, or an object of
            `precond.history`.
        curvature_interval: observe every so many steps, or when a function of the step says so.
        solver_interval: refresh the solver so often; as often as the curvature is observed when None.
        start_step: steps before the first preconditioned update; statistics are gathered from step 0.
        overrides: module-name glob, class or module -> dict(matrix=, repr=, solver=, damping=), or None to leave it.
        strict: raise where the representation cannot host a layer, instead of the fallback that `describe()` shows.
        loss_weights: "normalised": C = sum w_c C_c / sum w_c over the criterion calls of the step; "given": sum w_c C_c.
        on_nonfinite: a block with a gradient or direction that is not finite gets a zero direction ("zero", no host
            synchronisation), the whole step is skipped ("skip"), or it raises ("raise").
        seed: keys sampled labels; part of the state. Drawn from torch's generator when None.
        rows: module-name glob -> "flattened" or "second", for layers whose leading dimension is not the batch.
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
        self, *, matrix: str | Matrix | type[Matrix], repr: str | Representation | type[Representation],
        solver: str | Solver | type[Solver], damping: float | Damping = 1e-3, transforms: Sequence[Transform] | None = None,
        history: str | float | History = "local", curvature_interval: Interval = 1, solver_interval: Interval | None = None,
        start_step: int = 0, overrides: Overrides | None = None, strict: bool = False,
        loss_weights: Literal["normalised", "given"] = "normalised", on_nonfinite: OnNonfinite = "zero", seed: int | None = None,
        rows: Mapping[str, str] | None = None, self_check: bool = True,
    ) -> None:  # fmt: skip
        self.triple = Triple(MATRICES.create(matrix), REPRESENTATIONS.create(repr), SOLVERS.create(solver), damping)
        self.triple.check()
        self.transforms = tuple(transforms or ())
        self.history = histories.resolve(history)
        self.curvature_schedule = schedule.resolve(curvature_interval)
        self.solver_schedule = schedule.resolve(curvature_interval if solver_interval is None else solver_interval)
        _check_options(self.triple.repr, self.history, curvature_interval, solver_interval, start_step, loss_weights, on_nonfinite, rows)
        self.start_step, self.overrides, self.strict = start_step, overrides, strict
        self.loss_weights, self.on_nonfinite = loss_weights, on_nonfinite
        self.seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
        self.rows, self.self_check = dict(rows or {}), self_check
        self.diagnostics = Diagnostics()
        self._step = 0
        self._transform_states: list[dict[str, Any]] = [{} for _ in self.transforms]
        self._plan: Plan | None = None
        self._observer: Observer | None = None
        self._hooks: OptimizerHooks | None = None
        self._blocks: list[BlockState] = []
        self._written: list[tuple[int, int]] = []
        self._pending: dict[str, Any] | None = None

    # -- binding -------------------------------------------------------------------------------------------------

    def attach(
        self, model: nn.Module, criterion: Criterion | Sequence[Criterion] | None = None,
        optimizer: torch.optim.Optimizer | None = None, *, scaler: torch.amp.GradScaler | None = None,
    ) -> Self:  # fmt: skip
        """Bind to a model: hooks only, nothing of it is changed.

        criterion: a loss module, a likelihood, a name (then call `observe`), or a list of them. optimizer: its `step` calls
        ours; without one, call `step()` before it. scaler: AMP's, needed only by loss_weights="given".
        """
        if self._observer is not None:
            raise UsageError("this preconditioner is attached already: call remove() first, or build another one.")
        criteria = _criteria(criterion)
        self._resolved = [(c, likelihoods.resolve(c)) for c in criteria]
        self._group, self._scaler = Group(model), scaler
        self._model = unwrap(model)
        try:
            self._bind(criteria, optimizer)
        except BaseException:
            self.remove()
            raise
        return self

    def _bind(self, criteria: Sequence[Criterion], optimizer: torch.optim.Optimizer | None) -> None:
        self._make_plan()
        if not criteria and any(p.matrix.needs_criterion for p in self._blocks_plan()):
            raise UsageError(
                f"the matrix {self.triple.matrix.name!r} is made of the criterion's calls: pass it, attach(model, criterion, optimizer), or a name "
                f"({', '.join(likelihoods.REGISTRY.names())}) and call observe(loss, output, target) in the loop."
            )
        self._hooks = OptimizerHooks(self, optimizer) if optimizer is not None else None
        if self._pending is not None:
            self.load_state_dict(self._pending)

    def _blocks_plan(self) -> Iterable[Any]:
        assert self._plan is not None
        return self._plan.blocks

    def _make_plan(self) -> None:
        """Partition the model and hang the hooks; blocks that a re-plan leaves unchanged keep their state."""
        plan = make_plan(Partition(self._model), self.triple, self.overrides, self.strict)
        kept = {b.plan.block.name: b for b in self._blocks}
        self._blocks = []
        for block_plan in plan.blocks:
            _check_history(self.history, block_plan.repr)
            old = kept.get(block_plan.block.name)
            fresh = BlockState(block_plan, self.history)
            if old is not None and _coordinates(old.plan.block) == _coordinates(block_plan.block) and old.plan.triple == block_plan.triple:
                fresh.statistics, fresh.state, fresh.failures = old.statistics, old.state, old.failures
            self._blocks.append(fresh)
        if self._observer is not None:
            self._observer.remove()
        self._plan, self._observer = plan, self._make_observer(plan)

    def _renew(self) -> Observer | None:
        """Plan again where a parameter was frozen, added or swapped; what was observed in this step stays, by matrix and kind."""
        old, parts = self._plan, self._attached().parts
        if old is None or not old.partition.outdated():
            return None
        self._make_plan()
        assert self._plan is not None
        numbers = {(d.matrix, d.kind): number for number, d in enumerate(self._plan.demands)}
        for part in parts:
            kept = {numbers.get((old.demands[n].matrix, old.demands[n].kind)): columns for n, columns in part.columns.items()}
            part.columns = {n: columns for n, columns in kept.items() if n is not None}
        self._attached().parts = parts
        return self._attached()

    def _make_observer(self, plan: Plan) -> Observer:
        layers = plan.observed_layers()
        needed = any(p.matrix.needs_criterion for p in plan.blocks)
        check = None
        if self.self_check and layers:
            names = {p.name: b.block.name for b in plan.blocks if b.kind == "columns" for p in b.block.parameters}
            partition = plan.partition
            check = SelfCheck(lambda seen: partition.layers[seen.name].total(seen), names)
        observer = Observer(
            self._model, layers, plan.demands, due=self._due, step=lambda: self._step, seed=self.seed, rank=self._group.rank,
            rows=self.rows, selfcheck=check, renew=self._renew,
        )  # fmt: skip
        if needed:
            observer.watch_model()
            for criterion, likelihood in self._resolved:
                if isinstance(criterion, nn.Module):
                    observer.watch_criterion(criterion, likelihood)
        return observer

    def _due(self) -> bool:
        return self.curvature_schedule.due(self._step)

    def remove(self) -> None:
        """Leave no hook behind; the statistics stay readable."""
        if self._observer is not None:
            self._observer.remove()
        if self._hooks is not None:
            self._hooks.remove()
        self._observer = self._hooks = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def observe(self, loss: Tensor, output: Tensor, target: Tensor) -> Tensor:
        """Watch a loss that no criterion module computed; call it before `loss.backward()`. Returns the loss."""
        observer = self._attached()
        if not self._resolved:
            raise UsageError("observe() needs to know what the loss stands for: attach(model, criterion=...) with a likelihood or its name.")
        needed = any(p.matrix.needs_criterion for p in self._blocks_plan())
        if needed and torch.is_grad_enabled() and loss.requires_grad and self._due():
            if not observer.observe(loss, output, target, self._resolved[0][1]):
                raise UsageError("observe() was given an output that no forward pass of the attached model made in this step.")
        return loss

    def _attached(self) -> Observer:
        if self._observer is None:
            raise UsageError("this preconditioner is not attached: call attach(model, criterion, optimizer) first.")
        return self._observer

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Rewrite p.grad now. Called by the optimizer's `step` where one is attached, else by the loop."""
        if not self.rewrite(scale=None):
            raise UsageError("no parameter has a gradient: call loss.backward() before step().")
        self.end_step()

    @torch.no_grad()
    def rewrite(self, scale: Tensor | None) -> bool:
        """Observe, refresh, apply and write; False where no parameter has a gradient. `scale`: AMP's, for fused optimizers."""
        observer = self._renew() or self._attached()
        plan = self._plan
        assert plan is not None
        params = {n: p for n, p in plan.partition.tensors.items() if p.grad is not None}
        if not params:
            return False
        marks = [(id(p.grad), p.grad._version) for p in params.values() if p.grad is not None]
        if marks == self._written:
            raise UsageError("step() was called twice for one backward pass: p.grad holds the preconditioned gradient already.")
        inverse = None if scale is None else 1.0 / scale
        gradients = {n: _wide(p.grad) if inverse is None else _wide(p.grad) * inverse for n, p in params.items() if p.grad is not None}
        with numerics.full_precision(next(iter(params.values())).device.type):  # a whole loop may be under autocast
            if self._due():
                self._observe(observer, plan, gradients)
            directions = self._directions(gradients)
        self._write(params, directions, scale)
        self._written = [(id(p.grad), p.grad._version) for p in params.values() if p.grad is not None]
        return True

    def _observe(self, observer: Observer, plan: Plan, gradients: Tensors) -> None:
        if not observer.parts and any(p.matrix.needs_criterion for p in plan.blocks):
            raise UsageError(
                "this step differentiated no loss that the preconditioner saw: compute it with the attached criterion on the model's output "
                "(under gradients), or call observe(loss, output, target) before loss.backward()."
            )
        names = {p.name for b in plan.blocks if b.kind == "gradient" for p in b.block.parameters}
        tensors = plan.partition.tensors
        complete = {n: gradients[n] if n in gradients else torch.zeros_like(_wide(tensors[n])) for n in names}
        assembly = Assembly(plan, observer, self._group, self.loss_weights, self._amp_scale())
        observations = assembly.observations(complete)
        stages = sorted({s for b in self._blocks for s in b.plan.repr.stages}, key=_stage_order(self._blocks))
        for stage in stages:
            for flag in assembly.merge(self._blocks, observations, stage):
                self.diagnostics.count("observations_dropped", ~flag)
        self.diagnostics.count("observations")
        if self.solver_schedule.due(self._step) or any(b.state is None for b in self._blocks):
            self._refresh()

    def _amp_scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def _refresh(self) -> None:
        names = {"float64": "retries_float64", "damping": "retries_damping", "cpu": "retries_cpu", "kept": "blocks_kept"}
        for block in self._blocks:
            rung = block.refresh(_FAILURE_LIMIT)
            if rung is not None and rung != "kept":
                self.diagnostics.count("refreshes")
            if rung in names:
                self.diagnostics.count(names[rung])

    def _directions(self, gradients: Tensors) -> Tensors:
        """The new gradients, by parameter."""
        with_gradient = [b for b in self._blocks if any(n in gradients for n in b.plan.block.names)]
        raw: Tensors = {}
        for b in with_gradient:
            raw[b.plan.block.name] = b.plan.block.gather(_filled(b, gradients))
        vectors, started = raw, self._step >= self.start_step
        for transform, state in zip(self.transforms, self._transform_states, strict=True):
            vectors = transform.before(vectors, state)
        directions = {}
        for b in with_gradient:
            vector = vectors[b.plan.block.name]
            directions[b.plan.block.name] = self._apply(b, vector) if started else vector
        rates = self._learning_rates() if self.transforms else {}
        for transform, state in zip(self.transforms, self._transform_states, strict=True):
            directions = transform.after(vectors, directions, rates, state, started)
        return self._scatter(with_gradient, raw, directions)

    def _apply(self, block: BlockState, vector: Tensor) -> Tensor:
        try:
            return block.apply(vector)
        except SolverFailure:  # a solve that broke down: this block does not move in this step
            self.diagnostics.count("solves_failed")
            return torch.zeros_like(vector)

    def _scatter(self, blocks: list[BlockState], raw: Tensors, directions: Tensors) -> Tensors:
        """Directions by parameter; what is not finite never reaches a parameter through us."""
        out: Tensors = {}
        flags = []
        for b in blocks:
            name = b.plan.block.name
            finite = numerics.all_finite([raw[name], directions[name]])
            flags.append(finite)
            direction = directions[name]
            out.update(b.plan.block.scatter(torch.where(finite, direction, torch.zeros_like(direction))))
        if flags and self.on_nonfinite != "zero" and not bool(torch.stack(flags).all()):
            bad = [b.plan.block.name for b, f in zip(blocks, flags, strict=True) if not bool(f)]
            if self.on_nonfinite == "raise":
                raise FloatingPointError(f"the gradient or direction of {', '.join(bad)} is not finite at step {self._step}.")
            self.diagnostics.count("steps_skipped")
            return {}
        for flag in flags:
            self.diagnostics.count("directions_zeroed", ~flag)
        return out

    def _write(self, params: dict[str, nn.Parameter], directions: Tensors, scale: Tensor | None) -> None:
        """Into p.grad; nothing at all, for the whole model, when the step is skipped."""
        if not directions and self._blocks and self.on_nonfinite == "skip":
            for p in params.values():
                p.grad = None
            return
        for name, p in params.items():
            if name in directions and p.grad is not None:
                direction = directions[name]
                p.grad.copy_(direction if scale is None else direction * scale)

    def abandon(self) -> None:
        """Forget the observations of a step whose update will not be made."""
        self._attached().forget()

    def end_step(self) -> None:
        """Clear what belongs to the step."""
        self._attached().forget()
        for block in self._blocks:
            block.end_step()
        self._step += 1
        self.diagnostics.count("steps")

    def _learning_rates(self) -> dict[str, float]:
        """The learning rate of each block: that of its first parameter's group; 1 where no optimizer is attached."""
        optimizer = self._hooks.optimizer() if self._hooks is not None else None
        groups = optimizer.param_groups if optimizer is not None else []
        by_parameter = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        assert self._plan is not None
        tensors = self._plan.partition.tensors
        return {b.plan.block.name: by_parameter.get(id(tensors[b.plan.block.names[0]]), 1.0) for b in self._blocks}

    # -- reading and saving --------------------------------------------------------------------------------------

    @property
    def operators(self) -> dict[str, Operator]:
        """Block name -> the operator of the present statistics; matrix-free ones live only within a step."""
        return {b.plan.block.name: b.operator() for b in self._blocks if b.measured()}

    def describe(self) -> Description:
        """A table: every trainable parameter, its block, its triple, damping, bytes held, and why it has none."""
        self._attached()
        assert self._plan is not None
        return describe(self._plan, self._blocks)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, by canonical names: `torch.load(weights_only=True)` reads it."""
        return {
            "version": 1, "step": self._step, "seed": self.seed, "counters": dict(self.diagnostics),
            "blocks": {
                b.plan.block.name: {
                    "holds": _holds(b), "statistics": dict(b.statistics), "state": _copied(b.state, None), "failures": b.failures,
                } for b in self._blocks
            },
            "transforms": _copied(self._transform_states, None),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, before or after `attach`. A block that is not in it raises."""
        if self._observer is None:
            self._pending = dict(state)
            return
        self._pending = None
        if not {"step", "seed", "counters", "blocks", "transforms"} <= set(state):
            raise UsageError("this is no state of a preconditioner: give load_state_dict() what state_dict() returned.")
        names = {b.plan.block.name for b in self._blocks}
        if set(state["blocks"]) != names:
            odd = sorted(set(state["blocks"]) ^ names)
            raise UsageError(f"the saved state belongs to another model or triple: it and this preconditioner differ in the blocks {', '.join(odd)}.")
        for b in self._blocks:
            name, held = b.plan.block.name, state["blocks"][b.plan.block.name]["holds"]
            if held != _holds(b):
                raise UsageError(f"the saved state belongs to another model or triple: its block {name!r} is {held}, here it is {_holds(b)}.")
        if len(state["transforms"]) != len(self.transforms):
            raise UsageError(f"the saved state has {len(state['transforms'])} transforms, this preconditioner {len(self.transforms)}.")
        self._step, self.seed = int(state["step"]), int(state["seed"])
        self._attached().seed = self.seed
        self.diagnostics.load(state["counters"])
        device = next(self._model.parameters()).device
        self._transform_states = [_copied(s, device) for s in state["transforms"]]
        for b in self._blocks:
            saved = state["blocks"][b.plan.block.name]
            b.statistics, b.state, b.failures = _copied(saved["statistics"], device), _copied(saved["state"], device), int(saved["failures"])


def _filled(block: BlockState, gradients: Tensors) -> Tensors:
    """The gradients of a block's parameters, zeros for those that have none in this step."""
    names = block.plan.block.names
    if all(n in gradients for n in names):
        return gradients
    like = next(gradients[n] for n in names if n in gradients)
    return {p.name: gradients[p.name] if p.name in gradients else like.new_zeros(p.shape) for p in block.plan.block.parameters}


def _criteria(criterion: Criterion | Sequence[Criterion] | None) -> list[Criterion]:
    if criterion is None:
        return []
    if isinstance(criterion, (str, nn.Module, Likelihood)) or not isinstance(criterion, Sequence):
        return [criterion]
    return list(criterion)


def _copied(tree: Any, device: torch.device | None) -> Any:
    """New containers, with copies of the tensors on a device; without one, the same tensors, which are never changed in place."""
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


def _coordinates(block: Block) -> tuple[Any, ...]:
    return block.rows, [(p.name, p.shape) for p in block.parameters]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _stage_order(blocks: Sequence[BlockState]) -> Callable[[str], int]:
    order: list[str] = []
    for b in blocks:
        order += [s for s in b.plan.repr.stages if s not in order]
    return order.index


def _check_history(history: History, representation: Representation) -> None:
    if representation.live and not isinstance(history, Local):
        raise InvalidCombination(
            f"representation {representation.name!r} holds products that live one step, so nothing can be averaged: use history='local'."
        )


def _check_options(
    representation: Representation, history: History, curvature: Interval, solver: Interval | None, start_step: int,
    loss_weights: str, on_nonfinite: str, rows: Mapping[str, str] | None,
) -> None:  # fmt: skip
    _check_history(history, representation)
    if representation.live and (curvature != 1 or solver not in (None, 1)):
        raise InvalidCombination(
            f"representation {representation.name!r} lives one step, so an older one cannot be applied: curvature_interval and "
            "solver_interval must be 1."
        )
    if start_step < 0:
        raise ValueError(f"start_step={start_step}: it is a number of steps, 0 or more.")
    for name, value, known in (("loss_weights", loss_weights, ("normalised", "given")), ("on_nonfinite", on_nonfinite, ("zero", "skip", "raise"))):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}.")
    for pattern, layout in (rows or {}).items():
        if layout not in ROW_LAYOUTS:
            raise ValueError(f"rows={{{pattern!r}: {layout!r}}}: choose one of {', '.join(map(repr, ROW_LAYOUTS))}.")
