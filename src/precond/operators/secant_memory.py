"""The matrix that a few secant pairs make of a multiple of the identity: L-BFGS."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.errors import SolverFailure
from precond.operators.base import Operator
from precond.operators.low_rank import LowRank
from precond.operators.shifted import Shifted
from precond.operators.spectral import Spectral


class SecantMemory(Operator):
    """B = sigma I after the BFGS updates by m pairs, oldest first, in compact form: B s = y of the newest pair.

    With S, Y of shape (m, n), D the diagonal and L the strictly lower part of S Y^T:
    B = sigma I - [sigma S; Y]^T [[sigma S S^T, L], [L^T, -D]]^-1 [sigma S; Y].

    Args:
        s, y: (m, n), with s^T y > 0 in each pair, whose length does not matter; zeros where there is no pair yet.
        initial: sigma, 0-dim.

    Memory 2 m n; a product 4 m n after 3 m^2 n once. Source: Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices and their
    use in limited memory methods", 1994.

    >>> B = SecantMemory(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor(1.0))
    >>> B @ torch.tensor([1.0, 0.0])
    tensor([3., 1.])
    """

    def __init__(self, s: Tensor, y: Tensor, initial: Tensor) -> None:
        if s.dim() != 2 or s.shape != y.shape or initial.dim() != 0:
            raise ValueError(
                f"SecantMemory takes s and y (m, n) and a 0-dim initial, not {tuple(s.shape)}, {tuple(y.shape)} and {tuple(initial.shape)}."
            )
        self.s, self.y, self.initial = s, y, initial

    @property
    def n(self) -> int:
        return self.s.shape[1]

    @property
    def _like(self) -> Tensor:
        return self.s

    def fields(self) -> dict[str, Any]:
        return {"s": self.s, "y": self.y, "initial": self.initial}

    @cached_property
    def direct(self) -> Shifted:
        """B as a low-rank matrix and a multiple of the identity."""
        return self._compact(self.initial, lambda SS, SY, YY: (self.initial * SS, SY.tril(-1), -SY.diagonal().diag()), -1.0)

    def inverse(self, shift: float | Tensor = 0.0) -> Shifted:
        """(B + shift I)^-1 in the same form; without a shift what the two-loop recursion applies.

        Raises:
            SolverFailure: it is singular or not finite.
        """
        made = self.unchecked_inverse(shift)
        if not bool(torch.stack([t.isfinite().all() for t in made.tensors()]).all()):
            raise SolverFailure(
                f"a SecantMemory of shape {tuple(self.shape)} has no finite inverse with the shift {float(shift):g}: increase the damping."
            )
        return made

    def unchecked_inverse(self, shift: float | Tensor = 0.0) -> Shifted:
        """The same without waiting for the device; not finite where there is none."""
        total = self.initial + shift
        return self._compact(
            1 / total,
            lambda SS, SY, YY: (shift * self.initial * SS, total * SY.tril(-1) - self.initial * SY, -total * SY.diagonal().diag() - YY), 1 / total,
        )  # fmt: skip

    def _compact(self, shift: Tensor, blocks: Any, factor: float | Tensor) -> Shifted:
        """The matrix shift I + factor [sigma S; Y]^T [[a, b], [b^T, c]]^-1 [sigma S; Y], with a, b and c of S S^T, S Y^T and Y Y^T."""
        S, Y = self.s, self.y
        a, b, c = blocks(S @ S.T, S @ Y.T, Y @ Y.T)
        empty = (S == 0).all(1).to(S.dtype).diag()  # a one in place of a pair that is not there, whose rows are zero
        middle = torch.cat([torch.cat([a + empty, b], 1), torch.cat([b.T, c + empty], 1)])
        inverse = torch.linalg.inv_ex(middle.double())[0].to(S.dtype) * factor
        return Shifted(LowRank(torch.cat([self.initial * S, Y]), (inverse + inverse.T) / 2), shift)

    def _matmul(self, V: Tensor) -> Tensor:
        return self.direct._matmul(V)

    def to_dense(self) -> Tensor:
        return self.direct.to_dense()

    def diagonal(self) -> Tensor:
        return self.direct.diagonal()

    def trace(self) -> Tensor:
        return self.direct.trace()

    def spectral(self) -> Spectral:
        return self.direct.spectral()

    def _colour(self, Z: Tensor) -> Tensor:
        return self.spectral().map(lambda b: b.clamp(min=0).sqrt())._matmul(Z)
