"""Conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping
from precond.errors import SolverFailure
from precond.numerics import powers_of_two
from precond.operators import Operator, pack, unpack
from precond.solvers.base import REGISTRY, State
from precond.solvers.preconditioners import Jacobi, Preconditioner
from precond.solvers.products import ProductSolver

NegativeCurvature = Literal["truncate", "raise", "boundary"]
Forcing = Literal["constant", "superlinear"]


@REGISTRY.register("cg")
@dataclass(frozen=True, kw_only=True)
class CG(ProductSolver):
    """C^-1 b by conjugate gradients (Hestenes and Stiefel 1952): products only, so any operator, matrix-free ones included.

    Apply costs one product an iteration and stops the host once an iteration; it is exact after as many iterations as C has distinct
    eigenvalues. Columns are solved side by side, one product with those not yet done. To the tolerance only is it linear and symmetric
    in b, and with `warm_start` it depends on the solution before.

    Args:
        max_iterations: at most so many products a column; the solution so far is taken.
        tolerance: stop when the residual is below this multiple of the right-hand side.
        forcing: "constant", or "superlinear": the multiple is min(tolerance, sqrt(|b|)), with which Newton's method converges superlinearly at the
            price of few products far from the minimum (Dembo and Steihaug 1983, who take a tolerance of 0.5).
        progress: stop, with k = max(10, i / 10), when the last k of i iterations lowered phi(x) = x^T C x / 2 - b^T x by less than k times
            this multiple of phi (Martens 2010, who takes 5e-4); 0: never.
        warm_start: start from this multiple of the previous solution; 0 starts from zero. So does a column whose residual there exceeds the
            right-hand side by 1 / sqrt(eps), as after a spike: what rounding leaves of such a start would outlast the iteration.
        preconditioner: "jacobi", a `Jacobi`, or a function of the damped operator that gives an operator close to its inverse.
        negative_curvature: at a direction d with d^T C d <= 0, "truncate" returns the solution so far (b itself, preconditioned, at the
            first iteration), "raise" fails, "boundary" goes along d to |x| = radius.
        radius: of the trust region of "boundary" (Steihaug 1983), which the iteration does not leave in any case.

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

    needs_definite: ClassVar[bool] = True

    max_iterations: int = 250
    tolerance: float = 1e-10
    forcing: Forcing = "constant"
    progress: float = 0.0
    warm_start: float = 0.0
    preconditioner: Literal["jacobi"] | Preconditioner | None = None
    negative_curvature: NegativeCurvature = "truncate"
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.max_iterations < 1 or self.tolerance < 0 or self.progress < 0:
            raise ValueError(
                f"cg needs max_iterations >= 1, tolerance and progress >= 0, not {self.max_iterations}, {self.tolerance} and {self.progress}."
            )
        if self.forcing not in get_args(Forcing):
            raise ValueError(f"forcing is 'constant' or 'superlinear', not {self.forcing!r}.")
        if self.negative_curvature not in get_args(NegativeCurvature):
            raise ValueError(f"negative_curvature is one of {', '.join(get_args(NegativeCurvature))}, not {self.negative_curvature!r}.")
        if isinstance(self.preconditioner, str) and self.preconditioner != "jacobi":
            raise ValueError(f"preconditioner is 'jacobi', a Jacobi(...), a function or None, not {self.preconditioner!r}.")
        if (self.negative_curvature == "boundary") != (self.radius is not None and self.radius > 0):
            raise ValueError("negative_curvature='boundary' needs a radius above 0, and only it has one.")
        if self.radius is not None and (self.warm_start or self.preconditioner is not None):
            raise ValueError(
                "negative_curvature='boundary' starts from zero without a preconditioner: else |x| need not grow along the way."
            )

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        new = {"x": state["x"]} if self.warm_start and "x" in state else {}
        new |= self._packed(operator, damping)
        if self.preconditioner is not None:
            make = Jacobi() if self.preconditioner == "jacobi" else self.preconditioner
            assert callable(make)
            new["preconditioner"] = pack(make(self.damped(operator, damping)))
        return new | {"iterations": 0, "residual": 0.0}

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        damped = self._unpacked(state, operator)
        P = unpack(state["preconditioner"]) if "preconditioner" in state else None
        before: Tensor | None = state.get("x") if self.warm_start else None
        start = self.warm_start * before if before is not None and before.shape == V.shape else None
        units = powers_of_two(V) if self.radius is None else V.new_ones(V.shape[1])  # a radius has units of its own
        X, iterations, residual = _Solve(self, damped, P, V, start, units).run()
        X = X * units
        return X, state | {"x": X, "iterations": iterations, "residual": residual}


class _Solve:
    """One solve of columns B (n, k) in `units` (k,); `active` are the columns not yet done, and R, D, rz have those alone."""

    def __init__(self, options: CG, C: Operator, P: Operator | None, B: Tensor, start: Tensor | None, units: Tensor) -> None:
        self.options, self.C, self.P = options, C, P
        self.B = B = B / units  # so that no square underflows or overflows
        self.X, self.R = self._start(None if start is None else start / units)
        self.sizes = B.norm(dim=0)
        self.residuals = torch.zeros_like(self.sizes)
        self.tolerances = (self.sizes * units).sqrt() if options.forcing == "superlinear" else torch.full_like(self.sizes, options.tolerance)
        self.tolerances = self.tolerances.clamp(max=options.tolerance)
        self.active = torch.arange(B.shape[1], device=B.device)
        self.D, self.rz = self.R, self.sizes
        self.values: list[Tensor] = []  # phi by iteration, of all columns

    def _start(self, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the iteration starts, and the residual there: zero for a column whose start is far too large."""
        if start is None:
            return torch.zeros_like(self.B), self.B.clone()
        R = self.B - self.C @ start
        good = R.norm(dim=0) * torch.finfo(R.dtype).eps ** 0.5 <= self.B.norm(dim=0)  # not where it is NaN
        return torch.where(good, start, 0.0), torch.where(good, R, self.B)

    def run(self) -> tuple[Tensor, int, float]:
        """Solution, iterations and relative residual, the largest over the columns."""
        self.X[:, self.sizes == 0] = 0
        self._keep(self.sizes != 0)
        self.D = self._preconditioned(self.R)
        self.rz = (self.R * self.D).sum(0)
        k = 0
        while True:
            self._drop_converged()
            if not self.active.numel() or k == self.options.max_iterations:
                return self.X, k, float(self.residuals.amax()) if self.residuals.numel() else 0.0
            if self._step(k):
                k += 1

    def _step(self, k: int) -> bool:
        """One iteration of the active columns; whether any is left that made it."""
        CD = self.C @ self.D
        curvature = (self.D * CD).sum(0)
        if bool((curvature <= 0).any()):
            CD, curvature = self._bend(k, CD, curvature)
            if not self.active.numel():
                return False
        step = self.rz / curvature
        ahead = self.X[:, self.active] + step * self.D
        if self.options.radius is not None and bool((outside := ahead.norm(dim=0) >= self.options.radius).any()):
            self._to_boundary(outside)
            inside = ~outside
            CD, step, ahead = CD[:, inside], step[inside], ahead[:, inside]
            self._keep(inside)
            if not self.active.numel():
                return True
        self.X[:, self.active] = ahead
        self.R = self.R - step * CD
        Z = self._preconditioned(self.R)
        new = (self.R * Z).sum(0)
        self.D, self.rz = Z + (new / self.rz) * self.D, new
        self._drop_stalled(k + 1)
        return True

    def _bend(self, k: int, CD: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """What becomes of the columns that met negative curvature; the rest of CD and curvature."""
        bent = curvature <= 0
        if self.options.negative_curvature == "raise":
            raise SolverFailure(f"cg met negative curvature at iteration {k}: increase the damping, or use 'lu', which takes it.")
        if self.options.negative_curvature == "boundary":
            self._to_boundary(bent)
        elif k == 0:
            self.X[:, self.active[bent]] = self.D[:, bent]
        self._note_residuals()
        kept = ~bent
        self._keep(kept)
        return CD[:, kept], curvature[kept]

    def _to_boundary(self, which: Tensor) -> None:
        """Along d to |x + t d| = radius, t > 0."""
        assert self.options.radius is not None
        columns = self.active[which]
        x, d = self.X[:, columns], self.D[:, which]
        dd, xd, xx = (d * d).sum(0), (x * d).sum(0), (x * x).sum(0)
        self.X[:, columns] = x + ((xd.square() + dd * (self.options.radius**2 - xx)).sqrt() - xd) / dd * d

    def _drop_converged(self) -> None:
        self._note_residuals()
        done = self.residuals[self.active] <= self.tolerances[self.active]
        if bool(done.any()):
            self._keep(~done)

    def _drop_stalled(self, i: int) -> None:
        """Martens' rule. phi = x^T C x / 2 - b^T x = -x^T (b + r) / 2."""
        if not self.options.progress:
            return
        phi = torch.zeros_like(self.sizes)
        phi[self.active] = -(self.X[:, self.active] * (self.B[:, self.active] + self.R)).sum(0) / 2
        self.values.append(phi)
        k = max(10, math.ceil(0.1 * i))
        if i <= k:
            return
        now, then = phi[self.active], self.values[i - k - 1][self.active]
        stalled = (then < 0) & ((now - then) / now < k * self.options.progress)
        if bool(stalled.any()):
            self._note_residuals()
            self._keep(~stalled)

    def _note_residuals(self) -> None:
        relative = self.R.norm(dim=0) / self.sizes[self.active]
        if not bool(relative.isfinite().all()):
            raise SolverFailure("cg broke down: its residual is not finite; check the product and the right-hand side.")
        self.residuals[self.active] = relative

    def _keep(self, which: Tensor) -> None:
        """Go on with these of the active columns."""
        self.active, self.R, self.D, self.rz = self.active[which], self.R[:, which], self.D[:, which], self.rz[which]

    def _preconditioned(self, R: Tensor) -> Tensor:
        return R if self.P is None else self.P @ R
