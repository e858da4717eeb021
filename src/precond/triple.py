"""The three choices with their damping, as the user made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from precond import cells
from precond.auto import Auto
from precond.damping import Amount, Damping
from precond.errors import InvalidCombination
from precond.matrices import REGISTRY as MATRICES
from precond.matrices import Matrix
from precond.observe import Kind
from precond.representations import REGISTRY as REPRESENTATIONS
from precond.representations import Representation
from precond.solvers import REGISTRY as SOLVERS
from precond.solvers import Solver

_OPTIONS = ("matrix", "repr", "solver", "damping")


@dataclass(frozen=True)
class Triple:
    """One cell with its damping as the user gave it. auto: chooses the representation by layer; `repr` is then the best it may choose."""

    matrix: Matrix
    repr: Representation
    solver: Solver
    damping: Amount | Damping
    auto: Auto | None = None

    @classmethod
    def make(cls, matrix: Any, repr: Any, solver: Any, damping: Amount | Damping) -> Triple:
        """From names or instances."""
        made, solved = MATRICES.create(matrix), SOLVERS.create(solver)
        auto = Auto() if repr == "auto" else repr if isinstance(repr, Auto) else None
        held = REPRESENTATIONS.create(repr) if auto is None else auto.most_faithful(made, solved, damping)
        return cls(made, held, solved, damping, auto)

    def check(self) -> Kind:
        return cells.check(self.matrix, self.repr, self.solver, self.damping)

    def changed(self, options: Mapping[str, Any]) -> Triple:
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise InvalidCombination(f"an override has the options {', '.join(_OPTIONS)}, not {', '.join(unknown)}.")
        return Triple.make(
            options.get("matrix", self.matrix), options.get("repr", self.auto or self.repr), options.get("solver", self.solver),
            options.get("damping", self.damping),
        )  # fmt: skip
