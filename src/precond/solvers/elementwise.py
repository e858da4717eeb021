"""Element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from precond.operators import Diagonal, KroneckerEigen, LowRankEigen, Operator
from precond.solvers.base import REGISTRY
from precond.solvers.spectral import SpectralSolver


@REGISTRY.register("elementwise")
@dataclass(frozen=True, kw_only=True)
class Elementwise(SpectralSolver):
    """damped^(-power) where the spectrum is there already: diagonals, and spectra in an eigenbasis.

    Refresh n; apply n, and two products a basis. With power 0.5 and `Outside` damping it is the division of Adam, RMSprop and AdaGrad.
    Options: see `SpectralSolver`.

    Raises:
        SolverFailure: a damped entry is zero, or negative with a power other than 1.

    >>> import torch
    >>> from precond.damping import Outside
    >>> solver = Elementwise(power=0.5)
    >>> state = solver.init(Diagonal(torch.tensor([4.0, 9.0])), Outside(1.0))
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([0.3333, 0.2500])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({Diagonal, KroneckerEigen, LowRankEigen})
