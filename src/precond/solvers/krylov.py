"""Functions of an operator in a Krylov subspace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping
from precond.errors import SolverFailure
from precond.lanczos import Tridiagonal, first_column, tridiagonalise
from precond.numerics import norm, round_off
from precond.operators import Absolute, Operator, Shifted
from precond.solvers.base import REGISTRY, State
from precond.solvers.products import ProductSolver

Method = Literal["lanczos", "minres"]
Function = Callable[[Tensor], Tensor]


@REGISTRY.register("krylov")
@dataclass(frozen=True, kw_only=True)
class Krylov(ProductSolver):
    """damped^(-power) b from `steps` products, in the space of b, C b, ..., C^(steps - 1) b with full re-orthogonalisation.

    "lanczos": |b| V f(T) e_1 with T = V^T C V and f(t) = (t + damping)^-power, or (|t| + damping)^-power with spectrum="abs" (saddle-free
    Newton): any power, C indefinite or not, and no product with |C| is formed. "minres": the x of that space with the least
    |b - damped x| (Paige and Saunders 1975), safe where T is singular; power 1. Both are exact once the space is invariant.
    Apply costs `steps` products and 4 steps^2 n a column, memory steps n, and stops the host once a step.

    With `previous_direction` the last solution is one more basis vector: -V (V^T C V + damping I)^-1 V^T b is Krylov subspace descent
    (Vinyals and Povey 2012) with the quadratic model in place of its inner line search.

    Args:
        power: p > 0.
        steps: the dimension of the space at most.
        tolerance: end earlier, where the relative residual ("minres") or the last two coefficients of the solution in the basis beside all
            ("lanczos") are below this.
        method: "lanczos" or "minres".
        spectrum: of C before it is damped: "keep" or "abs".
        previous_direction: one product more; the solution depends on the one before.

    State: the damped operator, "iterations", and "x" the last solution where it is needed.

    Raises:
        SolverFailure: the damped operator is singular on the space, indefinite with a power other than 1, or not finite.

    >>> from precond.damping import Tikhonov
    >>> from precond.operators import Diagonal
    >>> solver, C = Krylov(power=0.5, spectrum="abs"), Diagonal(torch.tensor([3.0, -8.0]))
    >>> solver.apply(solver.init(C, Tikhonov(1.0)), torch.ones(2))[0]
    tensor([0.5000, 0.3333])
    """

    needs_definite: ClassVar[bool] = False

    power: float = 1.0
    steps: int = 50
    tolerance: float = 0.0
    method: Method = "lanczos"
    spectrum: Literal["keep", "abs"] = "keep"
    previous_direction: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.power) or self.power <= 0:
            raise ValueError(f"the power of the krylov solver is positive and finite, not {self.power}: it applies the inverse power.")
        if self.steps < 1 or self.tolerance < 0:
            raise ValueError(f"krylov needs steps >= 1 and tolerance >= 0, not {self.steps} and {self.tolerance}.")
        if self.method not in get_args(Method) or self.spectrum not in ("keep", "abs"):
            raise ValueError(f"method is 'lanczos' or 'minres' and spectrum 'keep' or 'abs', not {self.method!r} and {self.spectrum!r}.")
        if self.method == "minres" and (self.power != 1 or self.spectrum != "keep" or self.previous_direction):
            raise ValueError(
                "method='minres' solves a linear system: power 1, spectrum='keep', no previous_direction; or choose 'lanczos'."
            )

    def damped(self, operator: Operator, damping: Damping) -> Operator:
        if self.spectrum == "abs" and not isinstance(operator, Absolute):
            operator = Absolute(operator, self.steps)
        return damping(operator, self.power)

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        kept = {"x": state["x"]} if self.previous_direction and "x" in state else {}
        return kept | self._packed(operator, damping) | {"iterations": 0}

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        damped = self._unpacked(state, operator)
        before = state.get("x")
        previous = before.unbind(1) if before is not None and before.shape == V.shape else [None] * V.shape[1]
        solved = [self._solve(damped, b, x) for b, x in zip(V.unbind(1), previous, strict=True)]
        X = torch.stack([x for x, _ in solved], 1) if solved else V
        if not bool(X.isfinite().all()):
            raise SolverFailure(
                f"the krylov solver found an operator of shape {tuple(damped.shape)} singular, not finite, or indefinite with power {self.power}: "
                "damping must be positive and exceed any negative eigenvalue; or choose spectrum='abs'."
            )
        return X, state | {"iterations": max((k for _, k in solved), default=0)} | ({"x": X} if self.previous_direction else {})

    def _solve(self, damped: Operator, b: Tensor, previous: Tensor | None) -> tuple[Tensor, int]:
        """One column, and the dimension of its Krylov space."""
        size = norm(b)
        if not bool(size != 0):
            return torch.zeros_like(b), 0
        if self.method == "minres":
            C, coefficients = damped, _least_residual
        else:
            C, f = _inside(damped, self.power)
            coefficients = lambda found: first_column(found.dense, f)  # noqa: E731  # the counterpart of _least_residual
        done = None if self.tolerance == 0 else lambda found: self._converged(found, coefficients(found))
        found = tridiagonalise(C.__matmul__, b, self.steps, done)
        if previous is None:
            return size * (found.basis @ coefficients(found)), len(found.diagonal)
        basis, T = _widened(C, found, previous)
        return size * (basis @ first_column(T, f)), len(found.diagonal)

    def _converged(self, found: Tridiagonal, y: Tensor) -> bool:
        if self.method == "minres":
            return bool(_residual(found, y).norm() <= self.tolerance)
        return len(y) > 2 and bool(y[-2:].norm() <= self.tolerance * y.norm())


def _inside(damped: Operator, power: float) -> tuple[Operator, Function]:
    """C and f with damped^-power = f(C); C is below any shift and absolute value. An eigenvalue within rounding of zero is zero, and f infinite."""
    inner, shift = (damped.operator, damped.shift) if isinstance(damped, Shifted) else (damped, 0.0)
    if isinstance(inner, Absolute):
        return inner.operator, lambda t: round_off(t.abs() + shift).pow(-power)
    return inner, lambda t: round_off(t + shift).pow(-power)


def _extended(found: Tridiagonal) -> Tensor:
    """(k + 1, k): T, and below it the part of C V that leaves the space."""
    T = found.dense
    last = torch.zeros_like(T[:1])
    last[0, -1] = found.rest
    return torch.cat([T, last])


def _least_residual(found: Tridiagonal) -> Tensor:
    y: Tensor = torch.linalg.pinv(_extended(found))[:, 0]
    return y


def _residual(found: Tridiagonal, y: Tensor) -> Tensor:
    residual = -(_extended(found) @ y)
    residual[0] += 1
    return residual


def _widened(C: Operator, found: Tridiagonal, extra: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q of the Krylov space and one more vector, its first column that of the Krylov basis, and Q^T C Q."""
    V, q = found.basis, extra
    for _ in range(2):
        q = q - V @ (V.T @ q)
    if not bool(q.norm() > 1e3 * torch.finfo(q.dtype).eps * extra.norm()):
        return V, found.dense
    q = q / q.norm()
    image = C @ q
    coupling, corner = (V.T @ image).unsqueeze(1), (q @ image).reshape(1, 1)
    return torch.cat([V, q.unsqueeze(1)], 1), torch.cat([torch.cat([found.dense, coupling], 1), torch.cat([coupling.T, corner], 1)])
