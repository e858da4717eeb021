"""A warm-started orthogonal basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from precond.damping import Damping
from precond.numerics import eigh, round_off
from precond.operators import Dense, Diagonal, Kronecker, KroneckerEigen, Operator, RootShifted, Shifted, Spectral, outer
from precond.operators.kronecker import matrices
from precond.orthogonal import follow
from precond.solvers.base import REGISTRY, State
from precond.solvers.spectral import SpectralSolver

Bases = dict[str, Tensor]


@REGISTRY.register("qr_iteration")
@dataclass(frozen=True, kw_only=True)
class QRIteration(SpectralSolver):
    """damped^(-power) in a basis Q that follows the eigenvectors: Q diag(d)^(-power) Q^T with d the damped diagonal of Q^T C Q.

    The first basis of each matrix is its eigenvectors. A refresh then costs one product, which gives d and tells how far Q^T C Q is from
    diagonal; only beyond `tolerance` does it take a step Q <- qr(C Q), columns by descending d, a product and a QR more. Relative to
    diag(d) the error is what is off the diagonal. Kronecker operators factor by factor, with exact damping as `eigen`.

    A spectrum measured in the basis (SOAP, EKFAC) is not the solver's: that is `kron_eigen` with basis="qr" and `elementwise`.
    Sources: Vyas et al. (SOAP, arXiv 2409.11321); the criterion is Distributed Shampoo's (Shi et al., arXiv 2309.06497).

    Args:
        tolerance: |B - diag(B)| <= tolerance |B| in Frobenius norms, B = Q^T C Q; resolved to the root of the machine epsilon.
        steps: at most so many a refresh.
        power, spectrum: see `SpectralSolver`.

    State: the inverse, "bases" and "steps" taken at the last refresh.

    Raises:
        SolverFailure: a damped eigenvalue is zero, or negative with a power other than 1.

    >>> import torch
    >>> from precond.damping import Tikhonov
    >>> solver = QRIteration(power=0.5)
    >>> state = solver.init(Dense(torch.diag(torch.tensor([3.0, 8.0]))), Tikhonov(1.0))
    >>> state = solver.refresh(state, Dense(torch.diag(torch.tensor([15.0, 8.0]))), Tikhonov(1.0))
    >>> solver.apply(state, torch.ones(2))[0], state["steps"]
    (tensor([0.2500, 0.3333]), 0)
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({Dense, Kronecker})

    tolerance: float = 0.01
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance < 0 or self.steps < 1:
            raise ValueError(f"qr_iteration needs tolerance >= 0 and steps >= 1, not {self.tolerance} and {self.steps}.")

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        known = operator if damping.keeps_eigenvectors else damping(operator, self.power)
        bases: Bases = {}
        taken: list[int] = []
        spectral = self._decompose(known, state.get("bases", {}), bases, taken)
        damped = self.damped(spectral, damping) if damping.keeps_eigenvectors else self._project(spectral)
        return self._inverted(damped.spectral(), operator) | {"bases": bases, "steps": max(taken, default=0)}

    def _decompose(self, operator: Operator, old: Bases, bases: Bases, taken: list[int]) -> Spectral:
        """The operator in the bases that follow its factors, which are put into `bases`, and the steps they took into `taken`."""
        if isinstance(operator, (Shifted, RootShifted)):
            inner = self._decompose(operator.operator, old, bases, taken)
            return type(operator).from_fields(operator.fields() | {"operator": inner}).spectral()
        assert isinstance(operator, (Dense, Kronecker))
        factors = (operator,) if isinstance(operator, Dense) else tuple(map(matrices, operator.factors))
        parts = [self._factor(str(m), matrices(F), old, bases, taken) for m, F in enumerate(factors)]
        if isinstance(operator, Dense):
            return KroneckerEigen([parts[0][0]], parts[0][1])
        values = [d if operator.exponent == 1 else d.clamp(min=0).pow(operator.exponent) for _, d in parts]
        return KroneckerEigen([Q for Q, _ in parts], operator.scaled(outer(values)))

    def _factor(self, name: str, F: Dense | Diagonal, old: Bases, bases: Bases, taken: list[int]) -> tuple[Tensor | None, Tensor]:
        if isinstance(F, Diagonal):
            spectral = F.spectral()
            return spectral.bases[0], spectral.spectrum
        A = F.matrix.reshape(-1, F.size, F.size)
        if name in old and old[name].shape == A.shape:
            Q, values, steps = follow(A, old[name].to(A), self.steps, self.tolerance)
            taken.append(steps)
        else:
            values, Q = eigh(A)
        bases[name] = Q
        return Q, round_off(values)
