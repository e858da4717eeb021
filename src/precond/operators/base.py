"""What a solver sees: a symmetric linear operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from precond.errors import InvalidCombination

if TYPE_CHECKING:
    from precond.operators.spectral import Spectral


class Operator(ABC):
    """A symmetric (n, n) linear operator; knows no network.

    A new structure writes `n`, `_like`, `fields()` and the product `_matmul`; everything else follows, at the cost of n
    products where
    it does not write better. Vectors are flat, (n,), or columns, (n, k), in the operator's own coordinates.
    """

    kinds: ClassVar[dict[str, type[Operator]]] = {}
    live: bool = False
    """Whether it holds a function, so that it can be neither saved nor cast and lives one step."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Operator.kinds[cls.__name__] = cls

    # --- what a structure writes

    @property
    @abstractmethod
    def n(self) -> int:
        """The number of rows."""

    @property
    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of the vectors it takes and gives."""

    @abstractmethod
    def _matmul(self, V: Tensor) -> Tensor:
        """The product with columns `V` (n, k)."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """All that it is made of: tensors, numbers, strings, operators, and mappings of them. `from_fields` takes them back."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """The operator that has these `fields()`."""
        return cls(**fields)

    def spectral(self) -> Spectral:
        """The same operator by its eigendecomposition."""
        raise InvalidCombination(
            f"a {self.kind} operator has no eigendecomposition of its parts: use a solver that needs products only, such as 'cg', "
            "or Dense(operator.to_dense())."
        )

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, for a positive semi-definite operator (-inf where it is singular)."""
        return self.spectral().logdet()

    @property
    def noise(self) -> int:
        """How many standard normals one sample needs."""
        return self.n

    def _colour(self, Z: Tensor) -> Tensor:
        """R Z for a fixed R (n, noise) with R R^T the operator; `Z` (noise, k)."""
        raise NotImplementedError(f"a {self.kind} operator has no square root to sample with: use Dense(operator.to_dense()).")

    def inverse_root(self, power: float) -> Callable[[Tensor], Tensor]:
        """Z -> R Z for a fixed R (n, n) with R R^T = C^-power, the pseudo-inverse where C is singular: what samples an inverse."""
        return self.spectral().map(lambda s: inverse_power(s, power / 2))._matmul

    # --- what follows

    @property
    def kind(self) -> str:
        """The name of the structure."""
        return type(self).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors it takes and gives."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors it takes and gives."""
        return self._like.device

    @property
    def batch(self) -> torch.Size:
        """The leading dimensions of a stack, whose block-diagonal it is, () for one matrix."""
        return torch.Size()

    @property
    def size(self) -> int:
        """The number of rows of one matrix of the stack."""
        return self.n // self.batch.numel()

    def block_diagonals(self) -> Tensor:
        """The diagonal of each matrix of the stack, (*batch, size)."""
        return self.diagonal().reshape(*self.batch, self.size)

    @property
    def shape(self) -> torch.Size:
        """(n, n)."""
        return torch.Size((self.n, self.n))

    def __matmul__(self, v: Tensor) -> Tensor:
        """C v for `v` (n,) or (n, k)."""
        if v.dim() not in (1, 2) or v.shape[0] != self.n:
            raise ValueError(
                f"a {self.kind} operator of shape {tuple(self.shape)} multiplies a vector ({self.n},) or columns ({self.n}, k), "
                f"not {tuple(v.shape)}."
            )
        if v.dtype != self.dtype:
            raise TypeError(f"a {self.kind} operator of {self.dtype} multiplies vectors of that dtype, not {v.dtype}: cast one with .to().")
        return self._matmul(v.unsqueeze(1)).squeeze(1) if v.dim() == 1 else self._matmul(v)

    def to_dense(self) -> Tensor:
        """The (n, n) matrix."""
        return self._matmul(torch.eye(self.n, dtype=self.dtype, device=self.device))

    def diagonal(self) -> Tensor:
        """The diagonal, (n,)."""
        return self.to_dense().diagonal()

    def trace(self) -> Tensor:
        """The sum of the diagonal, 0-dim."""
        return self.diagonal().sum()

    def quadratic_form(self, v: Tensor) -> Tensor:
        """v^T C v: 0-dim for `v` (n,), (k,) for columns (n, k)."""
        return (v * (self @ v)).sum(0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw (n,) from N(0, C), for a positive semi-definite C."""
        Z = torch.randn(self.noise, 1, dtype=self.dtype, device=self.device, generator=generator)
        return self._colour(Z).squeeze(1)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it holds."""
        return _tensors(self.fields())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """The same operator in another dtype (integer tensors stay integers) or on another device."""
        return type(self).from_fields({name: _cast(value, dtype, device) for name, value in self.fields().items()})

    def __repr__(self) -> str:
        return f"{self.kind}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


def number(x: float | Tensor, like: Operator) -> Tensor:
    """A float or a 0-dim tensor as a 0-dim tensor in the dtype and on the device of an operator."""
    return torch.as_tensor(x, dtype=like.dtype, device=like.device)


def inverse_power(eigenvalues: Tensor, p: float) -> Tensor:
    """s^-p, and 0 for 0."""
    return torch.where(eigenvalues == 0, eigenvalues, eigenvalues.pow(-p))


def _cast(value: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Operator):
        return value.to(dtype, device)
    if isinstance(value, Mapping):
        return {name: _cast(inner, dtype, device) for name, inner in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Operator):
        yield from _tensors(value.fields())
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
