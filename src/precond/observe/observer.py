"""The observer: the only object that hangs hooks on a user's model, criterion and loss.

It turns events into records, and records into the observations that matrices are made of:

    model forward, pre-hook     open a record; put hooks on the layers (only where something is due)
    layer forward hook          input and gradient edges of every call
    model forward hook          close the record; take the layer hooks away again
    criterion forward hook      output, target, and the forward pass they came from
    hook on the loss            the weight of the call; nested passes for columns, while the graph is whole
    tensor hooks on outputs     the true columns, during the user's own backward pass
    end of the backward pass    forget what accumulated no parameter gradient
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from precond.likelihoods import Likelihood, resolve, weigh
from precond.numerics import full_precision
from precond.observe.bridge import find_bridge
from precond.observe.catch import GradientCatch
from precond.observe.chain import ChainSums
from precond.observe.chain_sums import call_sums
from precond.observe.demand import Context, Demand, Reduce, Reduced
from precond.observe.grouping import by_layer
from precond.observe.guard import busy
from precond.observe.hooks import Hook
from precond.observe.matching import find_forward, refuse_reentrant_checkpoint
from precond.observe.observation import LayerColumns, Part, Tensors
from precond.observe.own_loss import LossReader
from precond.observe.passes import batched_grad, grouped, nested_columns
from precond.observe.recorder import Recorder
from precond.observe.records import CriterionCall
from precond.observe.selfcheck import SelfCheck
from precond.observe.streaming import streamed
from precond.randomness import keyed_generator

Target = Tensor | tuple[Any, ...]
_COLUMN_ELEMENTS = 1 << 18  # numbers at the outputs of all layers that columns may hold at once, however small the model


class Observer(Recorder):
    """Watches one model and its criteria; `step()` is the number of the present step, `seed()` keys all draws.

    followed: parameters whose gradient is caught, in a pass that will be run again.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], demands: Sequence[Demand], *, due: Callable[[], bool],
        step: Callable[[], int], seed: Callable[[], int], params: Sequence[nn.Parameter], rank: int = 0,
        rows: Mapping[str, str] | None = None, selfcheck: SelfCheck | None = None, renew: Callable[[], Observer | None] = lambda: None,
        followed: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(model, layers, due, rows or {}, renew)
        self.demands, self.params = list(demands), list(params)
        self.step, self.seed, self.rank, self.selfcheck = step, seed, rank, selfcheck
        self.parts: list[CriterionCall] = []
        self.slope: Tensors = {}  # the gradient of the parts, weights and all, as it reached the parameters
        self._catch = GradientCatch({n for d in self.demands if d.slope for n in d.params}.union(followed))
        self._followed = bool(followed)
        self._passes = 0
        self._index = (-1, 0)  # (step, criterion calls seen in it)
        self._marks: list[tuple[bool, int]] = []
        self._versions_after: list[int] = []
        self._readers: list[LossReader] = []

    def _wants_true_columns(self) -> bool:
        return any(d.backward for d in self.demands) or (self.selfcheck is not None and self.selfcheck.pending)

    def _keeps_outputs(self) -> bool:
        return self._followed or any(d.replayed for d in self.demands)

    def watch_criterion(self, criterion: nn.Module, likelihood: Likelihood) -> None:
        self._handles.add(criterion.register_forward_hook(Hook(self._after_criterion, likelihood), with_kwargs=True))

    def watch_own_loss(self, reader: LossReader) -> None:
        """Observe the loss that the model computes in its own forward pass."""
        self._readers.append(reader)

    def remove(self) -> None:
        """Leave no hook behind."""
        self._layer_handles.remove()
        self._handles.remove()
        self.forget()

    def forget(self) -> None:
        """Drop the observations of the step."""
        self.parts, self.slope = [], {}

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        super()._end_forward(model, args, kwargs, output)
        if output is None or self._idle():  # None: the forward pass raised
            return
        for reader in self._readers:
            own = reader.read(model, args, kwargs, output)
            if own is not None:
                self.observe(own.loss, own.output, own.target, resolve(own.criterion), own.criterion, own.factor)

    # -- the criterion -------------------------------------------------------------------------------------------

    def _after_criterion(
        self, likelihood: Likelihood, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        if self._idle() or not loss.requires_grad:
            return
        output = args[0] if args else kwargs["input"]
        target = args[1] if len(args) > 1 else kwargs["target"]
        further = (*args[2:], *(value for name, value in kwargs.items() if name not in ("input", "target")))
        current = likelihood.from_criterion(criterion)  # the options as they are at this call
        self.observe(loss, output, (target, *further), current, criterion)

    def observe(
        self, loss: Tensor, output: Tensor, target: Target, likelihood: Likelihood, criterion: nn.Module | None = None,
        factor: Tensor | None = None,
    ) -> bool:  # fmt: skip
        """Watch a loss computed from `output`; False where the output came from no recorded forward pass."""
        part = self.record(output, target, likelihood, criterion)
        if part is not None:
            part.factor = factor
            loss.register_hook(Hook(self._on_loss, part))  # never the loss itself: a hook that holds its own tensor is a leak
        return part is not None

    def record(self, output: Tensor, target: Target, likelihood: Likelihood, criterion: nn.Module | None) -> CriterionCall | None:
        """The record of a criterion call on `output`, numbered within the step; target: or (target, what else it was called with)."""
        labels, *further = target if isinstance(target, tuple) else (target,)
        likelihood, output = likelihood.given(output, *further)
        found = find_forward(output, self._key)
        if found is None:
            return None
        forward, nodes, number = found
        if forward.without_grad or forward.outputs:  # products observe no layer
            refuse_reentrant_checkpoint(output)
        step, count = self._index
        count = count + 1 if step == self.step() else 0
        self._index = (self.step(), count)
        bridge = find_bridge(forward.outputs[number], output) if forward.outputs else None
        return CriterionCall(forward, nodes, criterion, likelihood, output, labels, number, self.step(), count, bridge=bridge)

    # -- the backward pass ---------------------------------------------------------------------------------------

    def _on_loss(self, part: CriterionCall, gradient: Tensor) -> None:
        if busy() or not self.due():
            return
        if part.step != self.step():
            return  # a loss of an earlier step is not of this one
        if part.backward == self.clock.backward:  # a loss fires once a pass: the pass before raised, and never told us that it ended
            self.parts = [p for p in self.parts if p.backward != self.clock.backward]
            self.clock.backward = None
        if self.clock.backward is None:
            self._begin_backward()
        part.backward = self._passes
        # What is kept until the step is a copy: the hook's own record must stay whole for another pass over a retained graph.
        kept = replace(part, columns={}, gradients={}, reduced={}, chained={})
        part.forward.differentiated = True
        if part.factor is not None:
            gradient = gradient * part.factor.to(gradient.device)
        kept.likelihood, kept.weight, kept.scale = weigh(part.likelihood, part.output.detach(), part.target, gradient.detach())
        with torch.enable_grad():
            for number, demand in enumerate(self.demands):
                if demand.nested and demand.reduce is not None:
                    kept.reduced[number] = self.reduced(kept, number, demand.reduce)
                elif demand.nested:
                    kept.columns[number] = self.nested(kept, number)
                elif demand.sampled:
                    kept.gradients[number] = self.sampled(kept, number)
                elif demand.chained:
                    kept.chained[number] = self.chained(kept, number)
        self.parts.append(kept)

    def context(self, part: CriterionCall, number: int) -> Context:
        """What demand `number` may look at; its generator is keyed, so a replay draws the same labels again."""
        generator = keyed_generator(part.output.device, self.seed(), part.step, part.index, self.rank, number)
        return Context(part.likelihood, part.output.detach(), part.target, part.forward.batch, generator, part.mixed())

    def nested(self, part: CriterionCall, number: int) -> list[LayerColumns]:
        """The columns that demand `number` asks for, by a pass of our own from the criterion's input."""
        demand = self.demands[number]
        return nested_columns(part, demand.matrix.cotangents(self.context(part, number)), demand.layers)

    def reduced(self, part: CriterionCall, number: int, groups: Mapping[frozenset[str], Reduce]) -> Reduced:
        """The statistics of demand `number`, from few columns at a time: as many as are small beside the forward pass, else one.

        One column is reduced group by group on its way back, so that what is held of it is a layer's, not the network's.
        """
        demand, total = self.demands[number], Reduced()
        limit, first = self._limit(part, demand), True
        assert part.scale is not None
        one, scale = torch.ones_like(part.scale), part.scale

        def add(layers: frozenset[str], seen: Sequence[LayerColumns]) -> None:
            with torch.no_grad(), full_precision(part.output.device.type):
                found = groups[layers](Part(one, scale, part.forward.batch, by_layer(seen), first))
            for block, statistics in found.items():
                mine = total.setdefault(block, {})
                for name, value in statistics.items():
                    mine[name] = mine[name].add_(value) if name in mine else value

        with contextlib.ExitStack() as stack:
            send = stack.enter_context(streamed(part, list(groups), add)) if limit == 1 else partial(grouped, part, list(groups), add)
            for cotangents in demand.matrix.chunks(self.context(part, number), limit):
                send(cotangents)
                first = False
        return total

    def _limit(self, part: CriterionCall, demand: Demand) -> int:
        """How many columns, at the outputs of a demand's layers, are small beside what the forward pass and the weights take."""
        size = sum(call.size for call in part.forward.calls if call.name in demand.layers)
        weights = sum(p.numel() for p in self.params)
        return max(1, _COLUMN_ELEMENTS // max(1, size), size and weights // (4 * size))

    def chained(self, part: CriterionCall, number: int) -> ChainSums:
        """What the call adds to the recursion of demand `number` over the layers of a sequential model."""
        demand = self.demands[number]
        chunks = demand.matrix.chunks(self.context(part, number), self._limit(part, demand))
        with full_precision(part.output.device.type):
            return call_sums(self.model, part, demand.layers, chunks)

    def sampled(self, part: CriterionCall, number: int) -> dict[str, Tensor]:
        """The gradient, summed over terms, at the labels that demand `number` draws."""
        demand = self.demands[number]
        cotangents = demand.matrix.cotangents(self.context(part, number))
        found = batched_grad([part.output], list(demand.params.values()), [cotangents.to(part.output.dtype)])
        return {n: torch.zeros_like(p) if g is None else g[0].detach() for (n, p), g in zip(demand.params.items(), found, strict=True)}

    def _begin_backward(self) -> None:
        params = self.params
        if self.parts and self._abandoned(params):
            self.forget()
        self._passes += 1
        self.clock.backward = self._passes
        self._marks = [(p.grad is None, 0 if p.grad is None else p.grad._version) for p in params]
        if self.selfcheck is not None and self.selfcheck.pending:
            self.selfcheck.begin(self.model)
        if self._catch.names:
            self._catch.begin(self.model)
        # The engine calls back when the whole pass is over, whichever hooks and nested passes there were.
        torch.autograd.Variable._execution_engine.queue_callback(Hook(self._end_backward))

    def _abandoned(self, params: list[nn.Parameter]) -> bool:
        """True when the gradients that the kept parts belong to were thrown away: `zero_grad` since, without a step."""
        grads = [p.grad for p in params]
        if all(g is None for g in grads):
            return True
        written = [g is None or g._version != version for g, version in zip(grads, self._versions_after, strict=False)]
        return all(written) and not any(bool(g.any()) for g in grads if g is not None)

    def _end_backward(self) -> None:
        this, self.clock.backward = self.clock.backward, None
        if this is None:
            return
        params = self.params
        now = [(p.grad is None, 0 if p.grad is None else p.grad._version) for p in params]
        accumulated = now != self._marks or len(now) != len(self._marks)
        self._versions_after = [version for _, version in now]
        parts = [p for p in self.parts if p.backward == this]
        if self.selfcheck is not None and self.selfcheck.pending:
            self.selfcheck.end(parts, this, accumulated, frozenset(self.layers))
        caught = self._catch.end() if self._catch.names else {}
        if not accumulated:  # a gradient of something else (`autograd.grad(loss, x)`): no p.grad came of it
            for part in parts:
                for call in part.forward.calls:
                    for slot in call.slots:
                        slot[:] = [entry for entry in slot if entry[0] != this]
            self.parts = [p for p in self.parts if p.backward != this]
            return
        for name, gradient in caught.items():
            wide = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
            self.slope[name] = self.slope[name] + wide if name in self.slope else wide
        for part in parts:  # what is kept until the step holds no graph
            part.output = part.output.detach()
