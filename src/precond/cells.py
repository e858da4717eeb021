"""Which cells (matrix, representation, solver) have a meaning, and why the others have none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from precond.damping import Amount, Damping, resolve
from precond.errors import InvalidCombination, SolverFailure
from precond.matrices import REGISTRY as MATRICES
from precond.matrices import Matrix
from precond.observe import Kind
from precond.operators import (
    Dense,
    Diagonal,
    Gram,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    LowRank,
    LowRankEigen,
    MatrixFree,
    Operator,
    Pairs,
    Probed,
    Secant,
    SecantKronecker,
    SecantMemory,
    Sparse,
    SparsePrecision,
)
from precond.representations import REGISTRY as REPRESENTATIONS
from precond.representations import Representation
from precond.solvers import REGISTRY as SOLVERS
from precond.solvers import Solver


@dataclass(frozen=True)
class Cell:
    """One entry of the table; `reason` says why where it is not valid."""

    matrix: str
    repr: str
    solver: str
    valid: bool
    reason: str | None


_MADE_OF: dict[Kind, Kind] = {"pairs": "product", "whitening": "gradient"}


def _kinds(representation: Representation, solver: Solver) -> tuple[Kind, ...]:
    """What the representation can be built from, after what the solver follows, if it does; that alone where it takes no operator."""
    if not solver.follows:
        return representation.requests
    followed = tuple(kind for kind in (*representation.requests, *representation.followed) if kind in solver.follows)
    others = tuple(kind for kind in representation.requests if kind not in followed)
    return followed + others if Operator in solver.accepts else followed


def resolve_kind(matrix: Matrix, representation: Representation, solver: Solver) -> Kind | None:
    """The first kind of observation that all three agree on; whoever has products or a gradient has pairs."""
    given = [kind for kind in _kinds(representation, solver) if _MADE_OF.get(kind, kind) in matrix.supplies]
    if not solver.follows:
        return next(iter(given), None)
    return next((kind for kind in given if _unfit(representation.over(kind), solver) is None), next(iter(given), None))


def _unfit(held: Representation, solver: Solver) -> str | None:
    """Why a solver cannot fit its structure to the pairs that a representation holds, or None."""
    if held.structure is not Pairs or held.fit in solver.fits:
        return None
    return f"solver {solver.name!r} does not fit a {held.fit} structure to pairs, which representation {held.name!r} has"


def _words(kinds: tuple[str, ...]) -> str:
    words = {"columns": "columns (a, g)", "gradient": "the gradient of the step", "product": "products", "factors": "moments of layer inputs and outputs",
        "secant": "pairs of a step and the change of the gradient", "successive": "successive gradients",
        "layer_secant": "pairs at the outputs of layers", "pairs": "pairs (v, C v)", "whitening": "pairs (v, g) of the gradient and noise"}  # fmt: skip
    return " or ".join(words[k] for k in kinds)


def why_not(matrix: Matrix, representation: Representation, solver: Solver) -> str | None:
    """The reason a cell has no meaning, or None."""
    kinds, kind = _kinds(representation, solver), resolve_kind(matrix, representation, solver)
    if not kinds:
        return f"solver {solver.name!r} follows {_words(solver.follows)}, and representation {representation.name!r} has no form for them"
    if kind is None:
        alone = solver.follows and Operator not in solver.accepts
        who = f"solver {solver.name!r} follows" if alone else f"representation {representation.name!r} is built from"
        return f"{who} {_words(kinds)}, but matrix {matrix.name!r} gives only {_words(matrix.supplies)}"
    held = representation.over(kind)
    structure = held.structure
    if (unfit := _unfit(held, solver)) is not None:
        return unfit
    for name, other in held.beside.values():
        if other not in (supplies := MATRICES.create(name).supplies):
            told = f"representation {representation.name!r} is told to measure the matrix {name!r} by {_words((other,))}"
            return f"{told}, but that gives only {_words(supplies)}"
    if matrix.centred and not (representation.centres or kind in ("product", "pairs")):
        return f"representation {representation.name!r} has no form from which the outer product of a mean can be taken, as {matrix.name!r} needs"
    if not solver.takes(structure):
        taken = ", ".join(sorted({s.__name__ for s in solver.accepts}))
        return f"solver {solver.name!r} takes {taken} operators, but representation {representation.name!r} makes a {structure.__name__}"
    if not (matrix.definite or held.definite) and solver.power != 1 and getattr(solver, "spectrum", "auto") not in ("abs", "clamp"):
        return (
            f"matrix {matrix.name!r} is indefinite and has no real power -{solver.power:g}: use power=1, "
            "or spectrum='abs' or 'clamp' of the 'eigen' or 'elementwise' solver"
        )
    return None


def specimen(structure: type[Operator]) -> Operator:
    """A small operator of a structure, to ask a solver whether it can take a damping."""
    eye = torch.eye(2)
    if structure is MatrixFree:
        return MatrixFree(lambda v: v, 2, eye.dtype, "cpu")
    made: dict[type[Operator], Operator] = {
        Dense: Dense(eye), Diagonal: Diagonal(torch.ones(2)), Kronecker: Kronecker(eye, eye), KroneckerEigen: KroneckerEigen((eye, eye), eye + 1),
        Pairs: Pairs(eye[0], eye[0], "dense"), Secant: Secant(eye, *eye), SecantKronecker: SecantKronecker(Secant(eye, *eye), Probed(eye, torch.ones(2))),
        SecantMemory: SecantMemory(eye, eye, torch.ones(())),
        Gram: Gram([eye]), KroneckerSum: KroneckerSum(eye, eye), LowRank: LowRank(eye), LowRankEigen: LowRank(eye).spectral(),
        Sparse: Sparse(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), 2),
        SparsePrecision: SparsePrecision(torch.ones(2, 1, 1), torch.zeros(2, 0, dtype=torch.long)),
    }  # fmt: skip
    return made[structure]


def why_not_damping(structure: type[Operator], solver: Solver, damping: Amount | Damping) -> str | None:
    """The reason the solver cannot invert operators of a structure with this damping, or None."""
    operator = specimen(structure)
    try:
        solver.init(operator, resolve(damping, solver.natural_damping(structure)).at())
    except InvalidCombination as error:
        return str(error)
    except SolverFailure:  # a matter of numbers, not of kinds
        return None
    return None


def combinations() -> list[Cell]:
    """Every cell of the three registries, with default options.

    >>> [c.reason for c in combinations() if (c.matrix, c.repr, c.solver) == ("fisher_mc", "kron_io", "cholesky")]
    [None]
    """
    return [_cell(m, r, s) for m in MATRICES.names() for r in REPRESENTATIONS.names() for s in SOLVERS.names()]


def _cell(matrix: str, representation: str, solver: str) -> Cell:
    reason = why_not(MATRICES.create(matrix), REPRESENTATIONS.create(representation), SOLVERS.create(solver))
    return Cell(matrix, representation, solver, reason is None, reason)


def _nearby(matrix: Matrix, representation: Representation, solver: Solver) -> Iterator[tuple[Matrix, Representation, Solver]]:
    """Cells by distance: another solver, another representation, another matrix, then two changes."""
    matrices = [MATRICES.create(n) for n in MATRICES.names()]
    representations = [REPRESENTATIONS.create(n) for n in REPRESENTATIONS.names()]
    solvers = [SOLVERS.create(n) for n in SOLVERS.names()]
    # one that inverts what it is given before one that fits pairs, one made for a structure before one that takes many
    solvers.sort(key=lambda s: (bool(s.follows), Operator in s.accepts, len(s.accepts)))
    yield from ((matrix, representation, s) for s in solvers)
    yield from ((matrix, r, solver) for r in representations)
    yield from ((m, representation, solver) for m in matrices)
    yield from ((matrix, r, s) for r in representations for s in solvers)


def check(matrix: Matrix, representation: Representation, solver: Solver, damping: Amount | Damping) -> Kind:
    """The kind of observation of a valid cell; raises `InvalidCombination` with the reason and the nearest valid choice."""
    reason = why_not(matrix, representation, solver)
    if reason is not None:
        near = next((c for c in _nearby(matrix, representation, solver) if why_not(*c) is None), None)
        choice = "" if near is None else f". The nearest valid choice is matrix={near[0].name!r}, repr={near[1].name!r}, solver={near[2].name!r}"
        raise InvalidCombination(f"{reason}{choice}.")
    kind = resolve_kind(matrix, representation, solver)
    assert kind is not None
    refused = why_not_damping(representation.over(kind).structure, solver, damping)
    if refused is not None:
        raise InvalidCombination(refused)
    return kind
