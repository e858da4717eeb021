"""One axis at a time: the inverse of a structured operator, with no network."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from precond.damping import Damping, resolve
from precond.errors import InvalidCombination
from precond.operators import BlockDiagonal, Diagonal, Inverse, InverseBlockDiagonal, Operator, Repeated
from precond.solvers import Elementwise, Solver, get, names


def inverse(
    operator: Operator,
    *,
    solver: str | Solver | type[Solver],
    damping: float | Tensor | Damping = 0.0,
    power: float | None = None,
) -> Inverse | InverseBlockDiagonal:
    """The damped operator to the power -`power`.

    Args:
        operator: any structured operator. Blocks of a `BlockDiagonal` are inverted one by one; a diagonal one that the solver does not
            take is inverted element by element, to the same power. A matrix-free one must live as long as the inverse.
        solver: a name, a class or an instance. One that learns its inverse over refreshes (`psgd`, `riemannian`, `heavy_ball`) is as far as one
            refresh takes it: give it as many as it needs, such as PSGD(updates=1000, probes=n).
        damping: a number, which becomes the object natural to solver and structure, or an object of `precond.damping`.
        power: None: the solver's own.

    Returns:
        An operator whose `.damped` is what it inverts.

    Raises:
        InvalidCombination: the solver cannot take the structure, the damping or the power.
        SolverFailure: the damped operator is singular, indefinite or not finite. Nothing is retried: no other matrix is inverted than
            the one asked for.

    >>> import torch
    >>> from precond.operators import Kronecker
    >>> C = Kronecker(torch.ones(2), torch.tensor([3.0]))
    >>> P = inverse(C, solver="eigen", damping=1.0, power=0.5)
    >>> P @ torch.ones(2), P.damped.diagonal()
    (tensor([0.5000, 0.5000]), tensor([4., 4.]))
    """
    chosen = with_power(solver, power)
    if isinstance(operator, BlockDiagonal):
        blocks = {name: _block(block, chosen, damping) for name, block in operator.blocks.items()}
        return InverseBlockDiagonal(blocks, operator.positions, operator.n)
    return _inverse(operator, chosen, damping)


def with_power(solver: str | Solver | type[Solver], power: float | None = None) -> Solver:
    """The solver of a name, a class or an instance, with the power asked for; raises `InvalidCombination` where it cannot have it."""
    if isinstance(solver, Solver):
        if power is not None and power != solver.power:
            raise InvalidCombination(f"power={power} was asked for, but this {solver.name} solver has power {solver.power}: give one.")
        return solver
    member = get(solver) if isinstance(solver, str) else solver
    if power is None or (power == 1 and not _has_power(member)):
        return member()
    if not _has_power(member):
        others = ", ".join(name for name in names() if _has_power(get(name)))
        raise InvalidCombination(f"the {member.name} solver applies the power -1 only, not {-power}: solvers with a power are {others}.")
    return member(power=power)  # type: ignore[call-arg]  # checked just above


def _has_power(member: type[Solver]) -> bool:
    return dataclasses.is_dataclass(member) and "power" in {field.name for field in dataclasses.fields(member)}


def _block(block: Operator, solver: Solver, damping: float | Tensor | Damping) -> Inverse | InverseBlockDiagonal:
    if isinstance(block, BlockDiagonal):
        return inverse(block, solver=solver, damping=damping)
    if isinstance(block, Diagonal) and not solver.takes(block):
        solver = Elementwise(power=solver.power)
    return _inverse(block, solver, damping)


def _inverse(operator: Operator, solver: Solver, damping: float | Tensor | Damping) -> Inverse:
    structure = type(operator.operator) if isinstance(operator, Repeated) else type(operator)
    rule = resolve(damping, solver.natural_damping(structure)).at()
    state = solver.init(operator, rule)
    return Inverse(solver, state, solver.damped(operator, rule), solver.power, operator)
