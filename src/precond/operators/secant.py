"""Matrices that come with the constraint they were last made to satisfy, for solvers that follow the constraint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor

from precond.operators.base import Operator
from precond.operators.dense import Dense
from precond.operators.kronecker import Kronecker
from precond.operators.secant_memory import SecantMemory
from precond.secant import PairRule


class Secant(Dense):
    """A symmetric matrix B, or a stack of them, and the newest pair (s, y) of it, B s = y where the pair counted.

    Args:
        matrix: (*batch, n, n). s, y: (*batch, n); zeros where there is no new pair.
        rule: how a solver is to damp the pair.

    Damping adds shift s to y, so that the pair belongs to what is inverted.

    >>> B = Secant(torch.eye(2), s=torch.tensor([1.0, 0.0]), y=torch.tensor([1.0, 0.0]))
    >>> B.plus(0.5).y
    tensor([1.5000, 0.0000])
    """

    def __init__(self, matrix: Tensor, s: Tensor, y: Tensor, rule: PairRule | None = None) -> None:
        super().__init__(matrix)
        if s.shape != matrix.shape[:-1] or y.shape != s.shape:
            raise ValueError(f"the pair of matrices {tuple(matrix.shape)} has vectors {tuple(matrix.shape[:-1])}, not {tuple(s.shape)} and {tuple(y.shape)}.")
        self.s, self.y, self.rule = s, y, rule or PairRule()

    def fields(self) -> dict[str, Any]:
        return {"matrix": self.matrix, "s": self.s, "y": self.y, "rule": asdict(self.rule)}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        return cls(fields["matrix"], fields["s"], fields["y"], PairRule(**fields["rule"]))

    def plus(self, shift: Tensor | float) -> Secant:
        amount = torch.as_tensor(shift, dtype=self.dtype, device=self.device)
        return Secant(super().plus(shift).matrix, self.s, self.y + amount[..., None] * self.s, self.rule)


class Probed(Dense):
    """A symmetric matrix, or a stack of them, and the direction along which a solver is to learn its inverse.

    Args:
        matrix: (*batch, n, n). probe: (*batch, n); zeros where there is no new one.

    >>> Probed(torch.eye(2), torch.ones(2)).plus(1.0).probe
    tensor([1., 1.])
    """

    def __init__(self, matrix: Tensor, probe: Tensor) -> None:
        super().__init__(matrix)
        if probe.shape != matrix.shape[:-1]:
            raise ValueError(f"the probe of matrices {tuple(matrix.shape)} is {tuple(matrix.shape[:-1])}, not {tuple(probe.shape)}.")
        self.probe = probe

    def fields(self) -> dict[str, Any]:
        return {"matrix": self.matrix, "probe": self.probe}

    def plus(self, shift: Tensor | float) -> Probed:
        return Probed(super().plus(shift).matrix, self.probe)


class SecantKronecker(Kronecker):
    """A Kronecker product one factor of which is a `Secant` or a `SecantMemory`: K-BFGS, the other a `Probed` or a diagonal.

    >>> B = Secant(torch.eye(2), torch.zeros(2), torch.zeros(2))
    >>> SecantKronecker(B, Probed(torch.eye(3), torch.ones(3))).shape
    torch.Size([6, 6])
    """

    def __init__(self, *factors: Tensor | Operator, exponent: float = 1.0, scale: float | Tensor = 1.0) -> None:
        super().__init__(*factors, exponent=exponent, scale=scale)
        if not any(isinstance(F, (Secant, SecantMemory)) for F in self.factors):
            raise ValueError("SecantKronecker needs a factor that is a Secant or a SecantMemory; without a pair it is a Kronecker.")
