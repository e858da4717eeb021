"""One axis at a time: the curvature of a model on given data, with no training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from precond import likelihoods
from precond.assembly import Assembly
from precond.auto import Auto
from precond.blocks import Block
from precond.blockstate import BlockState
from precond.distributed import Group, unwrap
from precond.errors import NeedsTrajectory, ObservationError, UsageError
from precond.history import Local
from precond.likelihoods import Likelihood
from precond.matrices import Matrix
from precond.observe import Observer, Pair, Tensors, differentiate_batch
from precond.operators import BlockDiagonal
from precond.partition import Partition
from precond.plan import Plan
from precond.planning import make_plan
from precond.representations import Representation
from precond.solvers import CG
from precond.triple import Triple

Targets = Tensor | tuple[Any, ...]
Batch = tuple[Any, Targets]
SecantPair = tuple[Tensor | Mapping[str, Tensor], Tensor | Mapping[str, Tensor]]


def curvature(
    model: nn.Module, criterion: nn.Module, inputs: Any = None, targets: Targets | None = None, *, matrix: str | Matrix | type[Matrix],
    repr: str | Representation | type[Representation] | Auto, seed: int | None = None, exact: bool = False,
    batches: Iterable[Batch] | None = None, pairs: Iterable[SecantPair] | None = None, strict: bool = False, rows: Mapping[str, str] | None = None,
    self_check: bool = True,
) -> BlockDiagonal:  # fmt: skip
    """A curvature matrix in a representation, at the model's present parameters.

    Pure: no `.grad`, generator, hook, mode or buffer of the model differs afterwards.

    Args:
        model: returns a tensor, or an object or dict whose `logits`, or whose only tensor with a gradient, the criterion takes.
        inputs: a tensor, or a tuple or dict of them for the model's call. targets: as the criterion
            takes them; a tuple where it takes more than a target, as (target, var) of nn.GaussianNLLLoss.
        batches: instead, an iterable of (inputs, targets), of unequal sizes if need be: a mean loss weighs each by its
            number of terms, a sum adds.
        pairs: for a matrix made along the optimizer's path ('bfgs_hessian'), which needs no data: (s, y) in order, a step and the
            change of the gradient, each (P,) in the order below or a mapping from parameter names; under 'kron_io' mappings from
            layer names to vectors in the space of the layer's outputs, beside inputs and targets.
        matrix, repr: a name or an instance. strict: raise instead of falling back where a layer cannot be hosted.
        seed: keys sampled labels; drawn from torch's generator when None (which is put back).
        self_check: whether a gradient is rebuilt from the calls of the layers first, for the price of a column, where the matrix is made of
            them: a weight that is used outside its layer, say, is an error then. 'matrix_free' sees every use.
        exact: refuse BatchNorm in training mode, whose columns carry cross-example terms.

    Returns:
        A block-diagonal operator, (P, P) in the order of [p for p in model.parameters() if p.requires_grad], each
        flattened row-major; `blocks[name]` is a block in its own coordinates.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> C = curvature(model, nn.CrossEntropyLoss(), torch.ones(3, 2), torch.tensor([0, 1, 1]), matrix="ggn", repr="layer")
    >>> C.shape
    torch.Size([4, 4])
    """
    likelihood = likelihoods.resolve(criterion)
    plain = unwrap(model)
    # any solver will do: the cell's other two axes are what is asked for
    triple = Triple.make(matrix, repr, CG(), 0.0)
    trajectory = _trajectory(triple.matrix, pairs)
    plan = make_plan(Partition(plain), triple, None, strict)
    if trajectory and inputs is None and batches is None and all(b.kind != "layer_secant" for b in plan.blocks):
        states = [BlockState(p, Local()) for p in plan.blocks]
        _follow(states, plan, trajectory, triple.matrix)
        return _whole(states, plan)
    data = _batches(inputs, targets, batches)
    if exact:
        _refuse_batch_statistics(plain)
    with _unchanged(plain):
        key = int(torch.randint(2**31, ()).item()) if seed is None else seed
        observer = Observer(
            plain, plan.observed_layers(), plan.demands, due=lambda: True, step=lambda: 0, seed=lambda: key, params=[], rows=rows,
            selfcheck=plan.selfcheck() if self_check else None,
        )  # fmt: skip
        observer.watch_model()
        try:
            gradients = _record(observer, plan, criterion, likelihood, data)
            states = _build(observer, plan, gradients, likelihood, Group(plain))
            _follow(states, plan, trajectory, triple.matrix)
            return _whole(states, plan)
        finally:
            observer.remove()


def _batches(inputs: Any, targets: Targets | None, batches: Iterable[Batch] | None) -> list[Batch]:
    if (batches is None) == (inputs is None):
        raise UsageError("curvature() takes inputs and targets, or batches=, an iterable of (inputs, targets): one of the two.")
    data = list(batches) if batches is not None else [(inputs, targets)]
    if not data:
        raise UsageError("batches= is empty: curvature needs at least one batch.")
    return data  # type: ignore[return-value]


def _record(observer: Observer, plan: Plan, criterion: nn.Module, likelihood: Likelihood, data: list[Batch]) -> Tensors:
    """Forward passes, and in place of a backward pass the columns and the weighted mean gradient."""
    tensors = plan.partition.tensors
    wanted = {p.name for b in plan.blocks if b.kind in ("gradient", "whitening") for p in b.block.parameters}
    params = {n: p for n, p in tensors.items() if n in wanted}
    gradients: Tensors = {n: torch.zeros_like(p) for n, p in params.items()}
    weights: list[Tensor] = []
    for inputs, targets in data:
        weight, gradient = differentiate_batch(observer, criterion, likelihood, inputs, targets, params)
        weights.append(weight)
        gradients = {n: g + gradient[n] * weight.to(g.dtype) for n, g in gradients.items()}
    divisor = torch.stack(weights).sum() if likelihood.reduction != "sum" else torch.ones((), dtype=torch.float64)
    return {n: g.detach() / divisor.to(g.dtype) for n, g in gradients.items()}


def _build(observer: Observer, plan: Plan, gradients: Tensors, likelihood: Likelihood, group: Group) -> list[BlockState]:
    assembly = Assembly(plan, observer, group, "normalised" if likelihood.reduction != "sum" else "given", 1.0)
    observations = assembly.observations(gradients, gradients)
    states = [BlockState(p, Local()) for p in plan.blocks]
    for stage in dict.fromkeys(s for b in states for s in b.plan.repr.stages):
        assembly.reduction.merge(states, observations, stage)
        for b in states:
            b.statistics = b.plan.repr.rebase(b.statistics)
    return states


def _trajectory(matrix: Matrix, pairs: Iterable[SecantPair] | None) -> list[SecantPair]:
    if matrix.needs_trajectory and pairs is None:
        raise NeedsTrajectory(
            f"matrix {matrix.name!r} has no value from one batch, it is made from pairs along the optimizer's path: give pairs=[(s, y), ...], "
            "each a step of all parameters (P,) and the change of the gradient, or use it in a Preconditioner."
        )
    if pairs is not None and not matrix.needs_trajectory:
        raise UsageError(f"pairs= is for matrices made along the optimizer's path; {matrix.name!r} is made from inputs and targets.")
    return list(pairs or ())


def _follow(states: Sequence[BlockState], plan: Plan, pairs: Sequence[SecantPair], matrix: Any) -> None:
    for s, y in pairs:
        pair = Pair(_named(s, plan), _named(y, plan), matrix.rule)
        for b in states:
            b.merge(b.plan.repr.measure("pair", pair, b.plan.block, b.statistics), torch.ones((), dtype=torch.bool))


def _named(vector: Tensor | Mapping[str, Tensor], plan: Plan) -> Tensors:
    """A vector over all parameters, by name; a mapping as it is, if it has all the names that the blocks need."""
    if isinstance(vector, Tensor):
        parameters = plan.partition.parameters
        total = sum(p.numel for p in parameters.values())
        if vector.shape != (total,) or any(b.kind == "layer_secant" for b in plan.blocks):
            wanted = ", ".join(repr(n) for n in _names(plan))
            raise UsageError(f"a pair is two vectors ({total},), or two mappings with the names {wanted}; this one has the shape {tuple(vector.shape)}.")
        pieces = vector.split([p.numel for p in parameters.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
    missing = [name for name in _names(plan) if name not in vector]
    if missing:
        raise UsageError(f"a vector of a pair misses {', '.join(map(repr, missing))}: it is a mapping with the names {', '.join(map(repr, _names(plan)))}.")
    return dict(vector)


def _names(plan: Plan) -> list[str]:
    """What a pair is given by: layers where it is in the space of their outputs, parameters elsewhere."""
    return [name for b in plan.blocks for name in ((b.block.name,) if b.kind == "layer_secant" else b.block.names)]


def _whole(states: Sequence[BlockState], plan: Plan) -> BlockDiagonal:
    total = sum(p.numel for p in plan.partition.parameters.values())
    device = next(iter(plan.partition.tensors.values())).device
    return BlockDiagonal({b.name: b.operator() for b in states}, _Positions({b.name: b.plan.block for b in states}, device), total)


class _Positions(Mapping[str, Tensor]):
    """Where the coordinates of each block stand in the model's order, made when they are asked for."""

    def __init__(self, blocks: Mapping[str, Block], device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._blocks[name].positions().to(self._device)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ObservationError(
                f"exact=True, but {name!r} normalises by the batch: the examples are not independent. Call model.eval() first, with running statistics."
            )


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put generators and buffers back at the end."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    saved = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
