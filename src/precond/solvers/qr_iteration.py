"""A warm-started orthogonal basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from precond.damping import Damping
from precond.numerics import eigh, round_off
from precond.operators import Dense, Diagonal, Kronecker, KroneckerEigen, Operator, RootShifted, Shifted, Spectral, outer, unpack
from precond.operators.kronecker import matrices
from precond.orthogonal import Error, follow
from precond.solvers.base import REGISTRY, State
from precond.solvers.first_order import Shift, relative_size, resolvents, shift_of
from precond.solvers.spectral import SpectralSolver

Bases = dict[str, Tensor]


@REGISTRY.register("qr_iteration")
@dataclass(frozen=True, kw_only=True)
class QRIteration(SpectralSolver):
    """damped^(-power) in a basis Q that follows the eigenvectors: Q diag(d)^(-power) Q^T with d the damped diagonal of Q^T C Q.

    The first basis of each matrix is its eigenvectors. A refresh then costs one product, which gives d and what Q^T C Q has off the
    diagonal, E; only where that is more than `tolerance` does it move Q, by 1.6 products, a QR and another product a step
    (`precond.orthogonal.follow`).

    A matrix alone, with a multiple of the identity added and a power of at most 1, is inverted to first order in E, so that Q may stay for
    many refreshes; see `precond.solvers.first_order`. E is not formed but applied: four passes over n^2 numbers, beside two of `eigen`. A
    Kronecker operator goes factor by factor, with exact damping as `eigen`; there, and under any other damping, power or `spectrum`, E
    is left out.

    A spectrum measured in the basis (SOAP, EKFAC) is not the solver's: that is `kron_eigen` with basis="qr" and `elementwise`.
    Sources: Vyas et al. (SOAP, arXiv 2409.11321); the criterion without E is Distributed Shampoo's (Shi et al., arXiv 2309.06497).

    Args:
        tolerance: |damped^(p/2) X damped^(p/2) - I| <= tolerance |I|, X the result, in Frobenius norms and to leading order, which is
            p (p + 1) / 2 |G|^2, G_ij = E_ij / sqrt(|s_i s_j|), s the damped d; |G| is estimated, and an E within rounding is none. Where E is
            left out, |E| <= tolerance |C|.
        steps: at most so many a refresh. Where they leave |G| > 1/2, E counts for less, as if it were 1/2, so that X stays positive.
        power, spectrum: see `SpectralSolver`.

    State: the inverse, "bases", "steps" taken at the last refresh; "rest" and "resolvents" apply E.

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
        if self.power <= 1 and self.spectrum in ("auto", "keep"):
            shift = shift_of(known, damping, self.power)
            if shift is not None:
                return self._to_first_order(state, known, shift)
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
        parts: list[tuple[Tensor | None, Tensor]] = []
        for name, F in zip(map(str, range(len(factors))), map(matrices, factors), strict=True):
            if isinstance(F, Diagonal):
                spectral = F.spectral()
                parts.append((spectral.bases[0], spectral.spectrum))
            else:
                bases[name], d, _, steps = self._follow(F, old.get(name))
                taken.append(steps)
                parts.append((bases[name], round_off(d)))
        if isinstance(operator, Dense):
            return KroneckerEigen([parts[0][0]], parts[0][1])
        values = [d if operator.exponent == 1 else d.clamp(min=0).pow(operator.exponent) for _, d in parts]
        return KroneckerEigen([Q for Q, _ in parts], operator.scaled(outer(values)))

    def _follow(self, F: Dense, old: Tensor | None, error: Error | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
        A = F.matrix.reshape(-1, F.size, F.size)
        if old is None or old.shape != A.shape:
            return follow(A, eigh(A)[1], 0, self.tolerance, error)
        return follow(A, old.to(A), self.steps, self.tolerance, error)

    def _to_first_order(self, state: State, known: Operator, shift: Shift) -> State:
        """The state for a matrix alone."""
        F = known.operator if isinstance(known, Shifted) else known
        assert isinstance(F, Dense)
        sizes: list[Tensor] = []  # of each basis tried

        def error(Q: Tensor, d: Tensor, N: Tensor) -> Tensor:
            sizes.append(relative_size(Q, d, N, shift(d)))
            return sizes[-1].square() * (self.power * (self.power + 1) / 2 / math.sqrt(F.size))

        Q, d, N, steps = self._follow(F, state.get("bases", {}).get("0"), error)
        new = self._inverted(KroneckerEigen((Q,), shift(d)), known)
        less = (0.5 / sizes[-1]).clamp(max=1).sqrt()
        size = float(sizes[-1].amax())
        accuracy = self.tolerance * math.sqrt(F.size) / (10 * size) if size > 0 else 1.0  # a tenth of the tolerance in the result
        U = resolvents(shift(d), self.power, accuracy) * less[:, None, None]
        return new | {"bases": {"0": Q}, "steps": steps, "rest": N, "resolvents": U}

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        inverse = unpack(state["inverse"])
        if "rest" not in state:
            return inverse @ V, state
        assert isinstance(inverse, KroneckerEigen)
        Q, N, U = state["bases"]["0"], state["rest"], state["resolvents"]
        X = Q.mT @ V.reshape(*U.shape[:2], -1)
        many = (U.unsqueeze(-1) * X.unsqueeze(-2)).flatten(2)
        moved = (Q.mT @ (N @ many)).unflatten(2, (U.shape[2], X.shape[2]))
        Y = inverse.spectrum.unsqueeze(-1) * X - (U.unsqueeze(-1) * moved).sum(-2)
        return (Q @ Y).reshape(V.shape), state
