"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from precond.damping import Damping
from precond.errors import SolverFailure
from precond.lanczos import largest_eigenvalue
from precond.operators import Operator
from precond.solvers.base import REGISTRY, State
from precond.solvers.products import ProductSolver

MARGIN = 1.1
"""Step sizes stay below the inverse of the estimated largest eigenvalue by this factor."""
SLACK = 1.01
"""A residual that exceeds the first by more than rounding: no term of a convergent series does."""


@REGISTRY.register("neumann")
@dataclass(frozen=True, kw_only=True)
class Neumann(ProductSolver):
    """C^-1 b ~ a sum_{j <= K} (I - a C)^j b, by x <- x + a (b - C x) from x = a b: K products and nothing else.

    Converges iff 0 < a < 2 / lambda_max, where the error is exactly (I - a C)^(K + 1) C^-1 b. No residual of a convergent series
    exceeds the first one, so that one which does shows divergence: a is halved, and the series starts again. That stops the
    host once a term. With `warm_start` the iterate is carried over steps (LiSSA's with one term a mini-batch; the published K restarts at b).

    Sources: Agarwal, Bullins and Hazan (LiSSA, arXiv 1602.03943), whose "scale" is 1 / a; Krishnan, Xiao and Saurous
    (arXiv 1712.03298).

    Args:
        terms: K.
        step_size: a; None: 1 / (1.1 l), with l an estimate of lambda_max from `power_iterations` products at each refresh.
        power_iterations: see there.
        warm_start: start from this multiple of the previous result; 0 starts from a b.
        halvings: at most so often is a halved in one solve.

    State: the damped operator, "step_size", "halvings" since the refresh, "x" the last result where it is carried.

    Raises:
        SolverFailure: the series diverges at every step size tried, as it must along negative eigenvalues, or is not finite.

    >>> from precond.damping import Tikhonov
    >>> from precond.operators import Diagonal
    >>> solver = Neumann(terms=1, step_size=0.5)
    >>> solver.apply(solver.init(Diagonal(torch.tensor([1.0, 2.0])), Tikhonov(0.0)), torch.ones(2))[0]
    tensor([0.7500, 0.5000])
    """

    needs_definite: ClassVar[bool] = True

    terms: int = 50
    step_size: float | None = None
    power_iterations: int = 10
    warm_start: float = 0.0
    halvings: int = 10

    def __post_init__(self) -> None:
        if self.terms < 1 or self.power_iterations < 1 or self.halvings < 0:
            raise ValueError(
                f"neumann needs terms and power_iterations of at least 1, halvings of at least 0, not {self.terms}, {self.power_iterations} "
                f"and {self.halvings}."
            )
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size is above 0, or None for one from power iteration, not {self.step_size}.")

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        kept = {"x": state["x"]} if self.warm_start and "x" in state else {}
        return kept | self._packed(operator, damping) | {"step_size": self._step_size(self.damped(operator, damping)), "halvings": 0}

    def _step_size(self, damped: Operator) -> float:
        if self.step_size is not None:
            return self.step_size
        # the same start at every refresh and on every rank
        start = torch.randn(damped.n, generator=torch.Generator().manual_seed(0)).to(damped.device, damped.dtype)
        largest = float(largest_eigenvalue(damped.__matmul__, start, self.power_iterations))
        if not 0 < largest < float("inf"):
            raise SolverFailure(
                f"the neumann solver found an operator of shape {tuple(damped.shape)} zero or not finite: increase the damping."
            )
        return 1 / (MARGIN * largest)

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        damped = self._unpacked(state, operator)
        before: Tensor | None = state.get("x") if self.warm_start else None
        step: float = state["step_size"]
        if not bool(V.norm(dim=0).isfinite().all()):
            raise SolverFailure("the neumann solver was given a right-hand side that is not finite, or whose norm is not.")
        for halving in range(self.halvings + 1):
            start = self.warm_start * before if before is not None and before.shape == V.shape else step * V
            X = self._series(damped, V, start, step)
            if X is not None:
                kept = {"x": X} if self.warm_start else {}
                return X, state | {"step_size": step, "halvings": state["halvings"] + halving} | kept
            step = step / 2
        raise SolverFailure(
            f"the Neumann series of an operator of shape {tuple(damped.shape)} diverges at step size {2 * step:.2g} and each larger one tried: "
            "increase the damping beyond any negative eigenvalue, or use 'cg' or 'krylov'."
        )

    def _series(self, C: Operator, B: Tensor, X: Tensor, step: float) -> Tensor | None:
        """K terms, or None where they diverge."""
        first = torch.maximum(B.norm(dim=0), (B - C @ X).norm(dim=0)) if self.warm_start else B.norm(dim=0)
        for _ in range(self.terms):
            R = B - C @ X
            if not bool((R.norm(dim=0) <= SLACK * first).all()):
                return None
            X = X + step * R
        return X
