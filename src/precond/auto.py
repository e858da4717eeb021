"""`repr="auto"`: the most faithful structure of each layer that a budget of memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from precond import cells
from precond.damping import Amount, Damping
from precond.errors import InvalidCombination
from precond.matrices import Matrix
from precond.partition import Partition
from precond.representations import REGISTRY as REPRESENTATIONS
from precond.representations import Representation
from precond.solvers import Elementwise, Solver

if TYPE_CHECKING:  # the plan imports this module
    from precond.triple import Triple

CANDIDATES = ("layer", "kron_eigen", "kron_io", "kron_dim", "unit", "diagonal")


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Chooses a representation for each layer: `Preconditioner(repr=Auto(budget=...))`, or repr="auto".

    All layers have the same allowance, the largest with which the sum of what they take stays within the budget: each takes the most
    faithful structure within it, or its cheapest. So small layers are exact before large ones are, and more budget is never less
    faithful. A structure counts twice, for its statistics and for the solver's state, which is of the same size. One that costs more than a
    more faithful one is never chosen. `describe()` shows the choice and what the next better one would have needed.

    Args:
        budget: an int is bytes; a float is a multiple of the parameters' size.
        candidates: names of representations by layer, the most faithful first; those without meaning for the matrix, the solver
            or the layer are passed over. The last resort, `diagonal`, is solved by `elementwise` where the solver cannot.

    >>> from torch import nn
    >>> import torch, precond
    >>> model = nn.Sequential(nn.Linear(400, 100), nn.ReLU(), nn.Linear(100, 2))
    >>> preconditioner = precond.Preconditioner(matrix="ggn", repr=Auto(budget=24.0), solver="eigen")
    >>> _ = preconditioner.attach(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    >>> [row.triple for row in preconditioner.describe().rows if row.parameter.endswith("weight")]
    ['ggn x kron_eigen x eigen', 'ggn x layer x eigen']
    """

    budget: int | float = 8.0
    candidates: tuple[str, ...] = CANDIDATES

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not self.budget > 0:
            raise ValueError(f"Auto(budget={self.budget!r}): a positive number of bytes (int) or a multiple of the parameters' size (float).")
        if not self.candidates:
            raise ValueError("Auto(candidates=()): name at least one representation.")

    def most_faithful(self, matrix: Matrix, solver: Solver, damping: Amount | Damping) -> Representation:
        """The first candidate that the matrix and the solver have a cell with; raises where there is none."""
        made = [REPRESENTATIONS.create(name) for name in self.candidates]
        found = next((r for r in made if _works(matrix, r, solver, damping)), None)
        if found is None:
            names = ", ".join(repr(name) for name in self.candidates)
            raise InvalidCombination(f"matrix {matrix.name!r} and solver {solver.name!r} have no cell with any of {names}: choose the representation.")
        return found

    def allot(self, partition: Partition, triple: Triple, owners: Sequence[str]) -> dict[str, tuple[Triple, str]]:
        """A triple for each layer, and why."""
        options = {owner: self._options(partition, triple, owner) for owner in owners}
        options = {owner: found for owner, found in options.items() if found}
        allowed = self._bytes(partition)
        cheapest = sum(found[0][1] for found in options.values())
        if cheapest > allowed:
            raise InvalidCombination(
                f"Auto(budget={self.budget}) allows {allowed:,} bytes, and the cheapest structures of all layers need {cheapest:,}: raise the budget, or "
                "leave layers out with overrides={name: None}."
            )
        chosen = dict.fromkeys(options, 0)
        for allowance in sorted({cost for found in options.values() for _, cost in found}):
            levels = {owner: max(sum(cost <= allowance for _, cost in found) - 1, 0) for owner, found in options.items()}
            if sum(options[owner][level][1] for owner, level in levels.items()) > allowed:
                break
            chosen = levels
        return {owner: (options[owner][level][0], _reason(options[owner], level, allowed)) for owner, level in chosen.items()}

    def _bytes(self, partition: Partition) -> int:
        return self.budget if isinstance(self.budget, int) else int(self.budget * sum(p.numel() * p.element_size() for p in partition.tensors.values()))

    def _options(self, partition: Partition, triple: Triple, owner: str) -> list[tuple[Triple, int]]:
        """(triple, bytes), the cheapest and least faithful first; none costs more than the next."""
        found: list[tuple[Triple, int]] = []
        for name in self.candidates:
            option = _option(triple, REPRESENTATIONS.create(name))
            if option is None:
                continue
            kind = option.check()
            held = option.repr.over(kind)
            blocks = partition.blocks([owner], held.scope)
            if all(held.hosts(block) is None for block in blocks):
                itemsize = max(4, partition.tensors[blocks[0].names[0]].element_size())
                cost = 2 * sum(held.bytes_held(block, itemsize) for block in blocks)
                if not found or cost < found[-1][1]:
                    found.append((option, cost))
        return found[::-1]


def _option(triple: Triple, representation: Representation) -> Triple | None:
    """The triple with another representation, with `elementwise` for a diagonal where its solver cannot; None where it has no meaning."""
    solvers = (triple.solver, Elementwise(power=triple.solver.power)) if representation.name == "diagonal" else (triple.solver,)
    for solver in solvers:
        damping = triple.damping if solver is triple.solver or not isinstance(triple.damping, Damping) else triple.damping.plain()
        if _works(triple.matrix, representation, solver, damping):
            return replace(triple, repr=representation, solver=solver, damping=damping, auto=None)
    return None


def _works(matrix: Matrix, representation: Representation, solver: Solver, damping: Amount | Damping) -> bool:
    if cells.why_not(matrix, representation, solver) is not None:
        return False
    kind = cells.resolve_kind(matrix, representation, solver)
    assert kind is not None
    return cells.why_not_damping(representation.over(kind).structure, solver, damping) is None


def _reason(options: Sequence[tuple[Triple, int]], level: int, allowed: int) -> str:
    used = f"auto: {options[level][1]:,} of {allowed:,} bytes"
    if level + 1 == len(options):
        return f"{used}, the most faithful there is"
    better, cost = options[level + 1]
    return f"{used}; {better.repr.name!r} would take {cost:,}"
