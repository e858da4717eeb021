"""What the solvers that work on a spectrum have in common: powers, and what to do with negative eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from precond.damping import Damping
from precond.errors import SolverFailure
from precond.operators import Operator, Spectral, pack, unpack
from precond.solvers.base import Solver, State

Spectrum = Literal["auto", "keep", "clamp", "abs"]


@dataclass(frozen=True, kw_only=True)
class SpectralSolver(Solver):
    """damped^(-power) on the spectrum of an operator: rotate, multiply, rotate back.

    Args:
        power: p > 0.
        spectrum: what becomes of the eigenvalues of C before they are damped. "keep": nothing; "clamp": negative ones become 0; "abs":
            their absolute value, as in saddle-free Newton; "auto": "keep" for power 1, and for other powers only what rounding made
            negative becomes 0. What an eigendecomposition leaves within rounding of zero is zero in every case.
    """

    power: float = 1.0
    spectrum: Spectrum = "auto"

    def __post_init__(self) -> None:
        if not math.isfinite(self.power) or self.power <= 0:
            raise ValueError(f"the power of the {self.name} solver is positive and finite, not {self.power}: it applies the inverse power.")
        if self.spectrum not in get_args(Spectrum):
            raise ValueError(f"spectrum is one of {', '.join(get_args(Spectrum))}, not {self.spectrum!r}.")

    def damped(self, operator: Operator, damping: Damping) -> Operator:
        if self.spectrum not in ("clamp", "abs"):
            return damping(operator, self.power)
        if damping.keeps_eigenvectors:
            return damping(self._project(operator.spectral()), self.power)
        return self._project(damping(operator, self.power).spectral())

    def _project(self, spectral: Spectral) -> Spectral:
        if self.spectrum == "abs":
            return spectral.map(lambda s: s.abs())
        return spectral.map(lambda s: s.clamp(min=0)) if self.spectrum == "clamp" else spectral

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        # a damping that keeps the eigenvectors is added to the spectrum itself, which is exact for a Kronecker product
        known = operator.spectral() if damping.keeps_eigenvectors else operator
        return self._inverted(self.damped(known, damping).spectral(), operator)

    def _inverted(self, damped: Spectral, operator: Operator) -> State:
        """The state that applies the inverse power of a damped spectrum; the operator is named where there is none."""
        inverse = damped.map(self._invert)
        if not bool(inverse.spectrum.isfinite().all()):
            raise SolverFailure(
                f"the {self.name} solver found a {operator.kind} operator of shape {tuple(operator.shape)} singular, not finite, "
                f"or indefinite with power {self.power}: damping must be positive and exceed any negative eigenvalue; "
                "or choose spectrum='clamp' or 'abs'."
            )
        return {"inverse": pack(inverse)}

    def _invert(self, spectrum: Tensor) -> Tensor:
        return spectrum.reciprocal() if self.power == 1 else spectrum.pow(-self.power)

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        return unpack(state["inverse"]) @ V, state
