"""From the user's choices to a plan: overrides, what a representation can host, fallbacks, and the demands of all blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from precond import cells
from precond.blocks import Block
from precond.damping import Damping, resolve
from precond.errors import InvalidCombination, ObservationError, UsageError
from precond.layers import GENERIC
from precond.matrices import REGISTRY as MATRICES
from precond.matrices import Matrix
from precond.observe import Columns, Demand, Kind, Part, Reduce, Reduced
from precond.operators import Operator
from precond.partition import Partition
from precond.plan import BlockPlan, Plan
from precond.representations import REGISTRY as REPRESENTATIONS
from precond.representations import Representation
from precond.solvers import Eigen, Elementwise, Solver
from precond.triple import Triple

Overrides = Mapping[Any, Mapping[str, Any] | None]


@dataclass
class _Draft:
    """A plan being made. Demands are shared: blocks with the same matrix and kind are fed by one pass."""

    partition: Partition
    strict: bool
    blocks: list[BlockPlan] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    fed: list[tuple[Matrix, Kind, set[str]]] = field(default_factory=list)

    def add(self, block: Block, triple: Triple, kind: Kind, note: str | None = None) -> None:
        number, held = self._feed(triple.matrix, kind, block), triple.repr.over(kind)
        damping = resolve(triple.damping, triple.solver.natural_damping(held.structure))
        beside = {stage: self._feed(MATRICES.create(matrix), other, block) for stage, (matrix, other) in held.beside.items()}
        self.blocks.append(BlockPlan(held.coordinates(block), triple.matrix, held, triple.solver, damping, kind, number, note, beside))

    def _feed(self, matrix: Matrix, kind: Kind, block: Block) -> int:
        """The number of a demand, which the block's layers belong to from now on."""
        number = next((n for n, (m, k, _) in enumerate(self.fed) if (m, k) == (matrix, kind)), len(self.fed))
        if number == len(self.fed):
            self.fed.append((matrix, kind, set()))
        self.fed[number][2].update(block.layers)
        return number

    def leave(self, owner: str, reason: str, block: Block | None = None) -> None:
        """A layer that the user did not ask to leave out has no curvature: said once, and shown by `describe()`."""
        if self.strict:
            raise InvalidCombination(f"layer {owner!r} cannot be preconditioned: {reason}. Leave it out, overrides={{{owner!r}: None}}.")
        warnings.warn(
            f"layer {owner!r} keeps its plain gradient: {reason}. Say so with overrides={{{owner!r}: None}}, or give it another matrix there.",
            stacklevel=2,
        )
        self.left |= dict.fromkeys((p.name for p in (block.parameters if block else self.partition.owned(owner))), reason)

    def demands(self) -> Iterator[Demand]:
        for number, (matrix, kind, layers) in enumerate(self.fed):
            blocks = [b for b in self.blocks if number in (b.demand, *b.beside.values())]
            params = {n: self.partition.tensors[n] for b in blocks for n in b.block.names}
            yield Demand(matrix, kind, frozenset(layers), params, _reducer(matrix, kind, blocks))


def _reducer(matrix: Matrix, kind: Kind, blocks: Sequence[BlockPlan]) -> dict[frozenset[str], Reduce] | None:
    """Columns to statistics at once, where all blocks of a demand keep means that add over columns."""
    stats = [s for b in blocks for s in b.repr.statistics(b.block).values()]
    if kind != "columns" or any(b.repr.stages != ("all",) for b in blocks) or any(s.kind != "mean" for s in stats):
        return None

    def reduce(mine: Sequence[BlockPlan], part: Part) -> Reduced:
        observation = Columns((part,), part.share, matrix.centred)
        return {b.block.name: b.repr.measure("all", observation, b.block, {}) for b in mine}

    return {layers: partial(reduce, mine) for layers, mine in _by_layers(blocks)}


def _by_layers(blocks: Sequence[BlockPlan]) -> list[tuple[frozenset[str], list[BlockPlan]]]:
    """Blocks in groups, such that no two groups share a layer."""
    groups: list[tuple[frozenset[str], list[BlockPlan]]] = []
    for block in blocks:
        layers, mine = frozenset(block.block.layers), [block]
        for other in [g for g in groups if g[0] & layers]:
            groups.remove(other)
            layers, mine = layers | other[0], other[1] + mine
        groups.append((layers, mine))
    return groups


def make_plan(partition: Partition, default: Triple, overrides: Overrides | None, strict: bool) -> Plan:
    """Resolve every trainable parameter to a block or to the reason it has none."""
    if not partition.parameters and partition.unheld:
        raise UsageError("the optimizer holds none of the model's trainable parameters: build it from model.parameters() of this model.")
    if not partition.parameters:
        raise UsageError("the model has no trainable parameters (requires_grad is False on all of them): there is nothing to precondition.")
    chosen = _choose(partition, default, overrides or {})
    draft = _Draft(partition, strict)
    draft.left |= {p.name: "left by an override" for owner, triple in chosen.items() if triple is None for p in partition.owned(owner)}
    draft.left |= {n: "it has no entries" if 0 in shape else "not in the optimizer" for n, shape in partition.unheld.items()}
    groups: dict[int, tuple[Triple, list[str]]] = {}
    for owner, triple in chosen.items():
        if triple is not None and partition.owned(owner):
            groups.setdefault(id(triple), (triple, []))[1].append(owner)
    for triple, owners in groups.values():
        refused = triple.matrix.refuse(partition.model)
        if refused is not None:
            raise ObservationError(refused)
        _plan_group(draft, triple, owners)
    if not draft.blocks:
        raise UsageError("every layer of the model is left out, by an override or because the matrix has no meaning there: nothing is preconditioned.")
    demands = tuple(draft.demands())
    _refuse_layers(partition, demands)
    return Plan(partition, tuple(draft.blocks), demands, draft.left)


def _choose(partition: Partition, default: Triple, overrides: Overrides) -> dict[str, Triple | None]:
    """The triple of every layer: the last override that matches it, else the default."""
    triples = {key: None if options is None else default.changed(options) for key, options in overrides.items()}
    for triple in triples.values():
        if triple is not None:
            triple.check()
    chosen: dict[str, Triple | None] = dict.fromkeys(partition.layers, default)
    for key, triple in triples.items():
        matched = [name for name, layer in partition.layers.items() if _matches(key, name, layer.module)]
        if not matched:
            raise UsageError(
                f"the override {key!r} matches no layer with trainable parameters. The layers are: {', '.join(repr(n) for n in partition.layers)}."
            )
        chosen.update(dict.fromkeys(matched, triple))
    return chosen


def _matches(key: Any, name: str, module: nn.Module) -> bool:
    if isinstance(key, str):
        return fnmatchcase(name, key)
    if isinstance(key, type):
        return isinstance(module, key)
    if isinstance(key, nn.Module):
        return any(module is inner for inner in key.modules())
    raise UsageError(f"an override is keyed by a module-name glob, a module class or a module, not by {key!r}.")


def _plan_group(draft: _Draft, triple: Triple, owners: Sequence[str]) -> None:
    """The blocks of the layers that share a triple."""
    kind, partition = triple.check(), draft.partition
    if kind == "factors":
        for owner in owners:
            reason = _why_no_inputs(partition, owner)
            if reason is not None:
                draft.leave(owner, f"matrix {triple.matrix.name!r} is made of layer inputs that a weight multiplies, and {reason}")
        owners = [owner for owner in owners if _why_no_inputs(partition, owner) is None]
    if triple.auto is not None:
        allotted = triple.auto.allot(partition, triple, owners)
        for owner in owners:
            if owner not in allotted:
                draft.leave(owner, "none of the representations to choose from can host it")
                continue
            chosen, note = allotted[owner]
            for block in partition.blocks([owner], chosen.repr.scope):
                draft.add(block, chosen, chosen.check(), note)
        return
    if triple.repr.scope == "model":
        for block in partition.blocks(owners, "model"):
            draft.add(block, triple, kind)
        return
    for owner in owners:
        blocks = partition.blocks([owner], triple.repr.scope)
        held = triple.repr.over(kind)
        for block in blocks:
            reason = held.hosts(block)
            if reason is None:
                draft.add(block, triple, kind)
            elif draft.strict:
                raise InvalidCombination(
                    f"representation {triple.repr.name!r} cannot host layer {owner!r} ({type(partition.layers[owner].module).__name__}): {reason}. "
                    f"Give it another one, overrides={{{owner!r}: dict(repr=...)}}, or strict=False for the fallback {triple.repr.fallback(block)!r}."
                )
            else:
                _fall_back(draft, triple, owner, block, reason)


def _why_no_inputs(partition: Partition, owner: str) -> str | None:
    """Why a layer's parameters have no moment of inputs, or None."""
    layer = partition.layers[owner]
    weight = next((p for p in partition.owned(owner) if p.name == layer.parameters.get("weight")), None)
    if not (layer.rule.linear and (layer.rule.joint or layer.rule.one_hot)) or weight is None:
        return "it has none"
    if any(partition.layers[user].rule is not layer.rule for user, _ in weight.uses):
        return "its weight is tied between layers of different kinds, where inputs and outputs exchange roles"
    return None


def _fall_back(draft: _Draft, triple: Triple, owner: str, block: Block, reason: str) -> None:
    """The declared fallback of a representation that cannot host a layer, with the solver that its structure needs."""
    representation = REPRESENTATIONS.create(triple.repr.fallback(block))
    power = triple.solver.power
    candidates = (triple.solver, Elementwise(power=power), Eigen(power=power))
    found = ((s, _structure(triple.matrix, representation, s)) for s in candidates)
    solver, structure = next(((s, made) for s, made in found if s.takes(made)), (triple.solver, representation.structure))
    damping = triple.damping
    if isinstance(damping, Damping) and cells.why_not_damping(structure, solver, damping) is not None:
        damping = damping.plain()  # the same amount, in the form natural to the fallback
    instead = Triple(triple.matrix, representation, solver, damping)
    impossible = cells.why_not(triple.matrix, representation, solver)
    if impossible is not None:
        draft.leave(owner, f"{triple.repr.name}: {reason}; and {impossible}", block)
        return
    for fallback in draft.partition.blocks([owner], representation.scope):
        if set(fallback.names) <= set(block.names):
            draft.add(fallback, instead, instead.check(), f"fallback from {triple.repr.name}: {reason}")


def _structure(matrix: Matrix, representation: Representation, solver: Solver) -> type[Operator]:
    """What a representation makes of a matrix for a solver."""
    kind = cells.resolve_kind(matrix, representation, solver)
    return representation.structure if kind is None else representation.over(kind).structure


def _refuse_layers(partition: Partition, demands: Sequence[Demand]) -> None:
    """What a layer rule knows to be silently wrong, before the first step. The generic rule decides when it runs."""
    for demand in demands:
        for name in demand.layers if demand.kind == "columns" else ():
            layer = partition.layers[name]
            reason = layer.rule.refuse(layer.module) if layer.rule is not GENERIC else None
            if reason is not None:
                raise ObservationError(f"layer {name!r} ({type(layer.module).__name__}) is refused: {reason}; or leave it out, overrides={{{name!r}: None}}.")
