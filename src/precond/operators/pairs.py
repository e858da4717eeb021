"""Pairs (v, h) that a matrix is known by: a constraint with a structure, not a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn, Self, get_args

from torch import Tensor

from precond.errors import InvalidCombination
from precond.operators.base import Operator
from precond.operators.spectral import Spectral

ModeForm = Literal["dense", "diagonal", "identity"]
FitName = Literal["dense", "diagonal", "kronecker", "low_rank"]


@dataclass(frozen=True)
class Fit:
    """The structure that a solver gives to what it fits.

    Vectors are (batch, n_1, ..., n_k), flattened; each of the batch has one factor a mode, or a diagonal plus low rank.

    Args:
        sizes: (n_1, ..., n_k). forms: of the factor of each mode. rank: instead of factors, that of the low-rank part.

    >>> Fit((6,), ("dense",)).name, Fit((2, 3), ("dense", "diagonal")).name, Fit((6,), ("diagonal",), rank=2).name
    ('dense', 'kronecker', 'low_rank')
    """

    sizes: tuple[int, ...]
    forms: tuple[ModeForm, ...]
    batch: int = 1
    rank: int | None = None

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.forms) or not self.sizes:
            raise ValueError(f"a fit has one form a mode, not the sizes {self.sizes} and the forms {self.forms}.")
        unknown = [form for form in self.forms if form not in get_args(ModeForm)]
        if unknown:
            raise ValueError(f"the form of a mode is one of {', '.join(map(repr, get_args(ModeForm)))}, not {unknown[0]!r}.")
        if self.rank is not None and (self.rank < 1 or self.batch != 1 or self.forms != ("diagonal",)):
            raise ValueError("a fit of low rank has a rank of at least 1, one mode, its form 'diagonal', and no batch.")

    @property
    def n(self) -> int:
        """The length of the vectors."""
        n = self.batch
        for size in self.sizes:
            n *= size
        return n

    @property
    def numbers(self) -> int:
        """How many numbers its factors have."""
        if self.rank is not None:
            return (2 * self.rank + 1) * self.n
        return self.batch * sum({"dense": n * n, "diagonal": n, "identity": 0}[form] for n, form in zip(self.sizes, self.forms, strict=True))

    @property
    def name(self) -> FitName:
        """What it is called where solvers say which they can fit."""
        if self.rank is not None:
            return "low_rank"
        if all(form == "diagonal" for form in self.forms) and len(self.forms) == 1:
            return "diagonal"
        return "dense" if self.forms == ("dense",) else "kronecker"


class Pairs(Operator):
    """m pairs (v, h): h = C v, or of a gradient h and independent noise v; what BFGS and PSGD fit.

    Args:
        v, h: (m, n), or (n,) for one pair.
        structure: what is to be fitted to them; "dense" or "diagonal" stand for a `Fit` of all n coordinates.
        whitening: v is noise that has nothing to do with h.

    It has no product and no matrix; asking for one raises `InvalidCombination`. It is packed and cast like any operator.

    >>> import torch
    >>> pairs = Pairs(torch.ones(3), 2 * torch.ones(3), "diagonal")
    >>> pairs.shape, pairs.structure.name
    (torch.Size([3, 3]), 'diagonal')
    """

    def __init__(self, v: Tensor, h: Tensor, structure: Fit | Literal["dense", "diagonal"], *, whitening: bool = False) -> None:
        if v.shape != h.shape or v.dim() not in (1, 2):
            raise ValueError(f"Pairs takes v and h of one shape, (n,) or (m, n), not {tuple(v.shape)} and {tuple(h.shape)}.")
        self.v, self.h = (v.unsqueeze(0), h.unsqueeze(0)) if v.dim() == 1 else (v, h)
        if isinstance(structure, str):
            if structure not in ("dense", "diagonal"):
                raise ValueError(f"structure={structure!r}: 'dense', 'diagonal', or a Fit, which says the sizes of the modes.")
            structure = Fit((v.shape[-1],), (structure,))
        if structure.n != v.shape[-1]:
            raise ValueError(f"a fit of {structure.n} coordinates does not belong to pairs of {v.shape[-1]}.")
        self.structure, self.whitening = structure, whitening

    @property
    def n(self) -> int:
        return self.v.shape[-1]

    @property
    def _like(self) -> Tensor:
        return self.h

    def fields(self) -> dict[str, Any]:
        return {"v": self.v, "h": self.h, "structure": asdict(self.structure), "whitening": self.whitening}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        return cls(fields["v"], fields["h"], Fit(**fields["structure"]), whitening=fields["whitening"])

    def _matmul(self, V: Tensor) -> Tensor:
        self._refuse()

    def to_dense(self) -> Tensor:
        self._refuse()

    def spectral(self) -> Spectral:
        self._refuse()

    def inverse_root(self, power: float) -> Callable[[Tensor], Tensor]:
        self._refuse()

    def _colour(self, Z: Tensor) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InvalidCombination(
            "Pairs are a constraint, not a matrix: they have no product and no dense form. Fit them with the solver 'psgd' or 'bfgs', or build the "
            "matrix in another representation."
        )
