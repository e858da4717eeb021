"""Heavy ball on the linear system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from precond.damping import Damping, Tikhonov
from precond.operators import Operator
from precond.solvers.base import REGISTRY, State
from precond.solvers.products import ProductSolver


@REGISTRY.register("heavy_ball")
@dataclass(frozen=True, kw_only=True)
class HeavyBall(ProductSolver):
    """x <- rho x + beta (b - C x), carried over all steps: CurveBall, which solves C x = b while b and C move.

    The published z is -x. Without rho and beta both minimise x^T C x / 2 - b^T x over the span of x and r = b - C x:
    [[r^T C r, r^T C x], [r^T C x, x^T C x]] [beta, rho] = [b^T r, b^T x]; from x = 0 that is the Cauchy step, rho = 0.
    With both given and b, C fixed, x tends to (C + (1 - rho) / beta I)^-1 b where beta < 2 / lambda_max: this is what `damped` then
    says. One product an iteration, and one more an application where rho and beta are chosen; never waits for the device.

    Source: Henriques, Ehrhardt, Albanie and Vedaldi (CurveBall, arXiv 1805.08095).

    Args:
        rho: None: the best one. Published: 0.9 where it is given.
        beta: above 0, given together with rho; published 0.1.
        iterations: of each application.

    State: the damped operator, and "x". The direction is not linear in b.

    >>> from precond.operators import Diagonal
    >>> solver = HeavyBall()
    >>> x, state = solver.apply(solver.init(Diagonal(torch.tensor([1.0, 3.0])), Tikhonov(0.0)), torch.ones(2))
    >>> x
    tensor([0.5000, 0.5000])
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([1.0000, 0.3333])
    """

    needs_definite: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    rho: float | None = None
    beta: float | None = None
    iterations: int = 1

    def __post_init__(self) -> None:
        if (self.rho is None) != (self.beta is None):
            raise ValueError("heavy_ball takes both rho and beta, or neither, which chooses the best.")
        if self.rho is not None and self.beta is not None and not (0 <= self.rho <= 1 and self.beta > 0):
            raise ValueError(f"heavy_ball needs 0 <= rho <= 1 and beta > 0, not {self.rho} and {self.beta}.")
        if self.iterations < 1:
            raise ValueError(f"heavy_ball makes at least 1 iteration an application, not {self.iterations}.")

    def damped(self, operator: Operator, damping: Damping) -> Operator:
        damped = damping(operator, self.power)
        return damped if self.rho is None or self.beta is None else Tikhonov((1 - self.rho) / self.beta)(damped)

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        kept = {"x": state["x"]} if "x" in state else {}
        return kept | self._packed(operator, damping)

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        damped, X = self._unpacked(state, operator), state.get("x")
        if X is None or X.shape != V.shape:
            X = torch.zeros_like(V)
        if self.rho is not None and self.beta is not None:
            for _ in range(
                self.iterations
            ):  # the damped operator holds the (1 - rho) / beta: rho x + beta (b - C x) = x + beta (b - damped x)
                X = X + self.beta * (V - damped @ X)
            return X, state | {"x": X}
        CX = damped @ X
        for _ in range(self.iterations):
            R = V - CX
            CR = damped @ R
            beta, rho = _best(V, X, CX, R, CR)
            X, CX = rho * X + beta * R, rho * CX + beta * CR
        return X, state | {"x": X}


def _best(B: Tensor, X: Tensor, CX: Tensor, R: Tensor, CR: Tensor) -> tuple[Tensor, Tensor]:
    """Beta and rho of each column; rho is 0 where x and r are parallel, and both keep x where there is no residual.

    The 2 x 2 system is solved for the step from x, whose right-hand side is (r^T r, x^T r): at convergence that is a difference of nothing.
    """
    rr, xx, xr = (R * R).sum(0), (X * X).sum(0), (X * R).sum(0)
    a, b, c = (R * CR).sum(0), (R * CX).sum(0), (X * CX).sum(0)
    determinant = a * c - b * b
    regular = determinant > 10 * torch.finfo(a.dtype).eps * a * c
    both = torch.where(regular, determinant, 1.0)
    still = (rr == 0) | (a == 0)
    single = torch.where(still, 0.0, rr / torch.where(a == 0, 1.0, a))
    beta = torch.where(regular, (c * rr - b * xr) / both, single)
    return beta, 1 + torch.where(regular, (a * xr - b * rr) / both, torch.zeros_like(xx))
