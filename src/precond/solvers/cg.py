"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping
from precond.errors import SolverFailure
from precond.operators import Kronecker, KroneckerSum, Operator, Shifted, pack, unpack
from precond.solvers.base import REGISTRY, Solver, State

NegativeCurvature = Literal["truncate", "raise"]


@REGISTRY.register("cg")
@dataclass(frozen=True, kw_only=True)
class CG(Solver):
    """C^-1 b by conjugate gradients (Hestenes and Stiefel 1952): products only, so any operator, matrix-free ones included.

    Apply costs one product an iteration and stops the host once an iteration; it is exact after as many iterations as C has distinct
    eigenvalues. To the tolerance only is it linear and symmetric in b, and with `warm_start` it depends on the solution before.

    Args:
        max_iterations: at most so many products a column; the solution so far is taken.
        tolerance: stop when the residual is below this multiple of the right-hand side.
        warm_start: start from this multiple of the previous solution; 0 starts from zero.
        negative_curvature: at a direction d with d^T C d <= 0, "truncate" returns the solution so far (b itself at the first
            iteration), "raise" fails.

    State: the damped operator, "x" the last solution, "iterations" and "residual" (relative), the largest over the columns.

    Raises:
        SolverFailure: the iteration is not finite, or met negative curvature and was told to raise.

    >>> from precond.damping import Tikhonov
    >>> from precond.operators import MatrixFree
    >>> C, solver = MatrixFree(lambda v: 3 * v, 2, torch.float32, "cpu"), CG()
    >>> x, state = solver.apply(solver.init(C, Tikhonov(1.0)), torch.ones(2), C)
    >>> x, state["iterations"]
    (tensor([0.2500, 0.2500]), 1)
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset((Operator,))
    needs_definite: ClassVar[bool] = True
    live: ClassVar[bool] = True

    max_iterations: int = 250
    tolerance: float = 1e-10
    warm_start: float = 0.0
    negative_curvature: NegativeCurvature = "truncate"

    def __post_init__(self) -> None:
        if self.max_iterations < 1 or self.tolerance < 0:
            raise ValueError(f"cg needs max_iterations >= 1 and tolerance >= 0, not {self.max_iterations} and {self.tolerance}.")
        if self.negative_curvature not in get_args(NegativeCurvature):
            raise ValueError(f"negative_curvature is one of {', '.join(get_args(NegativeCurvature))}, not {self.negative_curvature!r}.")

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        kept = {"x": state["x"]} if self.warm_start and "x" in state else {}
        return kept | {"operator": pack(_materialise(self.damped(operator, damping))), "iterations": 0, "residual": 0.0}

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        damped = unpack(state["operator"], operator)
        before: Tensor | None = state.get("x") if self.warm_start else None
        if before is None or before.shape != V.shape:
            before = torch.zeros_like(V)
        solved = [self._solve(damped, b, self.warm_start * x) for b, x in zip(V.unbind(1), before.unbind(1), strict=True)]
        X = torch.stack([x for x, _, _ in solved], 1) if solved else V
        counts = {"iterations": max((k for _, k, _ in solved), default=0), "residual": max((r for _, _, r in solved), default=0.0)}
        return X, state | {"x": X} | counts

    def _solve(self, C: Operator, b: Tensor, x: Tensor) -> tuple[Tensor, int, float]:
        """One column: the solution, iterations, relative residual."""
        size = float(b.norm())
        if size == 0:
            return torch.zeros_like(b), 0, 0.0
        r = b - C @ x if self.warm_start else b
        d, rr = r, r @ r
        for k in range(self.max_iterations):
            if self._done(rr, size):
                return x, k, float(rr.sqrt()) / size
            Cd = C @ d
            curvature = d @ Cd
            if bool(curvature <= 0):
                if self.negative_curvature == "raise":
                    raise SolverFailure(f"cg met negative curvature at iteration {k}: increase the damping, or use 'lu', which takes it.")
                return (x if k else b), k, float(rr.sqrt()) / size
            step = rr / curvature
            x, r = x + step * d, r - step * Cd
            new = r @ r
            d, rr = r + (new / rr) * d, new
        self._done(rr, size)
        return x, self.max_iterations, float(rr.sqrt()) / size

    def _done(self, rr: Tensor, size: float) -> bool:
        residual = float(rr) ** 0.5 if float(rr) >= 0 else float("nan")
        if not residual < float("inf"):
            raise SolverFailure("cg broke down: its residual is not finite; check the product and the right-hand side.")
        return residual <= self.tolerance * size


def _materialise(damped: Operator) -> Operator:
    """The state should hold factors, not what would need an eigendecomposition at every application."""
    if isinstance(damped, (Kronecker, KroneckerSum)):
        return damped.materialise()
    if isinstance(damped, Shifted):
        return Shifted(_materialise(damped.operator), damped.shift)
    return damped
