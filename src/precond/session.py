"""A preconditioner bound to a model: plan, observer and blocks, and what a step does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from precond import numerics, trust
from precond.assembly import Assembly
from precond.blocks import Block
from precond.blockstate import BlockState
from precond.damping import Damping
from precond.directions import Vectors, directions, finite_only, gathered
from precond.distributed import Group
from precond.errors import UsageError
from precond.likelihoods import Likelihood
from precond.observe import LossReader, Observer, Tensors
from precond.options import Options, check_history
from precond.partition import Partition
from precond.plan import Plan
from precond.planning import make_plan
from precond.progress import Progress
from precond.reduction import Observations
from precond.transforms import Transform
from precond.triple import Triple
from precond.trust import Origin, Outcome

T = TypeVar("T")
_FAILURE_LIMIT = 3
_RUNGS = {"float64": "retries_float64", "damping": "retries_damping", "cpu": "retries_cpu", "kept": "blocks_kept"}


class Session:
    """One binding, from `attach` to `remove`.

    held: the ids of the parameters that the optimizer updates, None where there is no optimizer. setting: what the
    optimizer has for a parameter, such as "lr", or a default. amp_scale: what the loss was multiplied by, where a scaler was
    given. blocks: those of an earlier binding, whose state goes on where they fit.
    """

    def __init__(
        self, triple: Triple, options: Options, progress: Progress, model: nn.Module, group: Group,
        criteria: Sequence[tuple[object, Likelihood | None]], held: Callable[[], frozenset[int] | None], setting: Callable[[nn.Parameter, str, float], float],
        amp_scale: Callable[[], float], blocks: Sequence[BlockState],
    ) -> None:  # fmt: skip
        self.triple, self.options, self.progress = triple, options, progress
        self.model, self.group, self.criteria = model, group, criteria
        self.held, self.setting, self.amp_scale = held, setting, amp_scale
        self.blocks = list(blocks)
        progress.diagnostics.events.quiet = group.rank > 0
        self._written: list[tuple[int, int]] = []
        self._start: tuple[Tensors, Tensors] | None = None  # parameters and gradient before the update, where pairs are made after it
        self._origin: Origin | None = None  # the same of all parameters, where a damping wants to hear what the update does
        self._check_slope = options.self_check
        self.plan = self._plan()
        trust.check(self.plan)
        if held() is None and any(b.plan.repr.after for b in self.blocks):
            raise UsageError(
                f"the matrix {triple.matrix.name!r} is made from pairs that are taken after the optimizer's update: attach(model, criterion, optimizer)."
            )
        if held() is None and self._listens:
            raise UsageError("a damping that follows the loss hears of every update of the optimizer: attach(model, criterion, optimizer).")
        self.observer = self._observe_with(self.plan)

    # -- planning ------------------------------------------------------------------------------------------------

    @property
    def needs_criterion(self) -> bool:
        """Whether any block is made of the criterion's calls."""
        return self._listens or any(p.matrix.needs_criterion for p in self.plan.blocks)

    @property
    def _listens(self) -> bool:
        return any(p.damping.model for p in self.plan.blocks)

    def due(self) -> bool:
        """Whether this step observes."""
        return self.options.curvature.due(self.progress.step)

    def _plan(self) -> Plan:
        """Partition the model; blocks that a new plan leaves unchanged keep their state."""
        plan = make_plan(Partition(self.model, self.held), self.triple, self.options.overrides, self.options.strict)
        kept = {b.name: b for b in self.blocks}
        self.blocks = []
        for block_plan in plan.blocks:
            check_history(self.options.history, block_plan.repr, block_plan.solver, block_plan.kind)
            fresh, old = BlockState(block_plan, self.options.history), kept.get(block_plan.block.name)
            if old is not None and _coordinates(old.plan.block) == _coordinates(block_plan.block) and old.plan.triple == block_plan.triple:
                fresh.statistics, fresh.state, fresh.failures, fresh.level = old.statistics, old.state, old.failures, old.level
            self.blocks.append(fresh)
        return plan

    def _observe_with(self, plan: Plan) -> Observer:
        layers = plan.observed_layers()
        check = plan.selfcheck() if self.options.self_check else None
        observer = Observer(
            self.model, layers, plan.demands, due=self.due, step=lambda: self.progress.step, seed=lambda: self.progress.seed,
            params=list(plan.partition.tensors.values()), rank=self.group.rank, rows=self._rows(), selfcheck=check, renew=self.renew,
            followed=list(plan.partition.tensors) if any(b.damping.model for b in plan.blocks) else (),
        )  # fmt: skip
        if any(p.matrix.needs_criterion for p in plan.blocks) or any(b.damping.model for b in plan.blocks):
            observer.watch_model()
            for criterion, likelihood in self.criteria:
                if isinstance(criterion, LossReader):
                    observer.watch_own_loss(criterion)
                elif likelihood is not None and isinstance(criterion, nn.Module):
                    observer.watch_criterion(criterion, likelihood)
        return observer

    def _rows(self) -> dict[str, str]:
        """The user's layouts, and after them those that the reader of the model's own loss knows of: the first that matches counts."""
        rows = dict(self.options.rows)
        for criterion, _ in self.criteria:
            for name, layout in criterion.rows(self.model).items() if isinstance(criterion, LossReader) else ():
                rows.setdefault(name, layout)
        return rows

    def renew(self) -> Observer | None:
        """Plan again where a parameter was frozen, added or swapped; what was observed in this step stays, by matrix and kind."""
        if not self.plan.partition.outdated():
            return None
        old, parts = self.plan, self.observer.parts
        self.plan = self._plan()  # where this raises, the hooks stay: what is wrong is said again at each pass
        self.observer.remove()
        self.observer = self._observe_with(self.plan)
        numbers = {(d.matrix, d.kind): number for number, d in enumerate(self.plan.demands)}
        same = {b.block.name for b in self.plan.blocks for o in old.blocks if _coordinates(b.block) == _coordinates(o.block)}

        def moved(found: dict[int, T]) -> dict[int, T]:
            to = {n: numbers.get((old.demands[n].matrix, old.demands[n].kind)) for n in found}
            return {new: found[n] for n, new in to.items() if new is not None}

        for part in parts:
            part.columns, part.gradients, part.chained = moved(part.columns), moved(part.gradients), moved(part.chained)
            part.reduced = {n: {name: s for name, s in r.items() if name in same} for n, r in moved(part.reduced).items()}
        self.observer.parts = parts
        return self.observer

    # -- a step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rewrite(self, scale: Tensor | None) -> bool:
        """Observe, refresh, apply and write into p.grad; False where no parameter has a gradient.

        scale: AMP's, where a fused optimizer unscales inside its kernel.
        """
        self.renew()
        params = {n: p for n, p in self.plan.partition.tensors.items() if p.grad is not None}
        if not params:
            return False
        if list(_marks(params)) == self._written:
            raise UsageError("step() was called twice for one backward pass: p.grad holds the preconditioned gradient already.")
        gradients = {n: _wide(p.grad) if scale is None else _wide(p.grad) / scale for n, p in params.items() if p.grad is not None}
        with numerics.full_precision(next(iter(params.values())).device.type):  # a whole loop may be under autocast
            vectors = gathered(self.blocks, gradients, [] if self._waits else self._transforms)
            if self.due():
                self._observe(gradients, vectors)
            self._write(params, None if self._waits else self._directions(vectors), scale)
        self._written = list(_marks(params))
        return True

    @property
    def _waits(self) -> bool:
        """Whether no parameter moves in this step."""
        return self.options.before_start == "nothing" and not self._started

    @property
    def _transforms(self) -> list[tuple[Transform, dict[str, Any]]]:
        return list(zip(self.options.transforms, self.progress.transforms, strict=True))

    def _observe(self, gradients: Tensors, vectors: Vectors) -> None:
        if not self.observer.parts and self.needs_criterion:
            raise UsageError(
                "this step differentiated no loss that the preconditioner saw: compute it with the attached criterion on the model's output "
                "(under gradients; with `labels` where the model computes its loss), or call observe(loss, output, target) before loss.backward()."
            )
        names = {p.name for b in self.plan.blocks if b.kind in ("gradient", "whitening") for p in b.block.parameters}
        tensors = self.plan.partition.tensors
        zeros = {n: torch.zeros_like(_wide(tensors[n])) for n in names if n not in gradients}
        moved = vectors.by_parameter(self.blocks) if any(b.matrix.of_momentum for b in self.plan.blocks) else {}
        assembly = self._assembly()
        self._merge(assembly, assembly.observations(gradients | zeros, zeros | moved), [b for b in self.blocks if b.plan.repr.stages], "stages")
        self.progress.diagnostics.count("observations")
        pairs = {n: p for d in self.plan.demands if d.kind == "secant" for n, p in d.params.items()}
        if any(b.plan.repr.after for b in self.blocks):
            slope = assembly.slope(pairs, self._check_slope) if pairs else {}
            self._start, self._check_slope = ({n: p.detach().clone() for n, p in pairs.items()}, slope), False
        if self._started and any(b.plan.damping.asks(b.level) for b in self.blocks):
            self._origin, self._check_slope = Origin.of(assembly, self._check_slope), False

    def _assembly(self) -> Assembly:
        return Assembly(self.plan, self.observer, self.group, self.options.loss_weights, self.amp_scale())

    def _observe_update(self, start: Tensors, slope: Tensors) -> None:
        """The batch once more, at the parameters after the update."""
        assembly = self._assembly()
        self._merge(assembly, assembly.after(start, slope), [b for b in self.blocks if b.plan.repr.after], "after")

    def _merge(self, assembly: Assembly, observations: Observations, blocks: Sequence[BlockState], stages: str) -> None:
        """Measure and merge stage by stage, then refresh what was measured."""
        for stage in dict.fromkeys(s for b in blocks for s in getattr(b.plan.repr, stages)):
            for name, flag in assembly.reduction.merge(blocks, observations, stage).items():
                self.progress.diagnostics.count("observations_dropped", ~flag, name)
        if self.options.solver.due(self.progress.step) or any(b.state is None for b in blocks):
            self._refresh(blocks)

    def _refresh(self, blocks: Sequence[BlockState]) -> None:
        for block in blocks:
            rung = block.refresh(_FAILURE_LIMIT, self._damping(block))
            if rung is not None and rung != "kept":
                self.progress.diagnostics.count("refreshes")
            if rung in _RUNGS:
                self.progress.diagnostics.count(_RUNGS[rung], block=block.name)
        self.progress.diagnostics.events.flush()

    def _damping(self, block: BlockState) -> Damping:
        parameter = self.plan.partition.tensors[block.plan.block.names[0]]
        return block.plan.damping.at(self.progress.step, self.setting(parameter, "weight_decay", 0.0), block.level)

    @property
    def _started(self) -> bool:
        return self.progress.step >= self.options.start_step

    def _directions(self, vectors: Vectors) -> Tensors | None:
        progress, transforms, tensors = self.progress, self._transforms, self.plan.partition.tensors
        rates = {b.name: self.setting(tensors[b.plan.block.names[0]], "lr", 1.0) for b in self.blocks} if transforms else {}
        found = directions(self.blocks, vectors, transforms, rates, self._started, progress.diagnostics)
        return finite_only(self.blocks, found, vectors.raw, self.options.on_nonfinite, progress.step, progress.diagnostics)

    def _write(self, params: dict[str, nn.Parameter], found: Tensors | None, scale: Tensor | None) -> None:
        for name, p in params.items():
            if found is None:  # no parameter moves in this step: an optimizer leaves a parameter without a gradient alone
                p.grad = None
            elif name in found and p.grad is not None:
                p.grad.copy_(found[name] if scale is None else found[name] * scale)

    @torch.no_grad()
    def hear(self) -> None:
        """Tell the dampings that follow the loss what the optimizer's update did to it."""
        origin, self._origin = self._origin, None
        if not (self._listens and self._started and self.due()):
            return
        with numerics.full_precision(next(iter(self.plan.partition.tensors.values())).device.type):
            outcome = None if origin is None else Outcome(self._assembly(), self.blocks, origin)
            for block in self.blocks:
                asked = block.plan.damping.asks(block.level)
                block.level = block.plan.damping.after_step(block.level, outcome.move(asked) if outcome is not None and asked else None)

    def end_step(self) -> None:
        """Observe the update where that is asked for, and clear what belongs to the step."""
        start, self._start = self._start, None
        if start is not None:
            with torch.no_grad(), numerics.full_precision(next(iter(self.plan.partition.tensors.values())).device.type):
                self._observe_update(*start)
        self.observer.forget()
        for block in self.blocks:
            block.end_step()
        self.progress.step += 1
        self.progress.diagnostics.count("steps")


def _marks(params: dict[str, nn.Parameter]) -> Iterator[tuple[int, int]]:
    """Which tensors the gradients are, and how often they were written to."""
    return ((id(p.grad), p.grad._version) for p in params.values() if p.grad is not None)


def _coordinates(block: Block) -> tuple[Any, ...]:
    return block.rows, block.tiling, [(p.name, p.shape) for p in block.parameters]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
