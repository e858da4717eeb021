"""Kronecker eigenbasis with the exact diagonal in it: EK-FAC, SOAP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from precond.blocks import Block, Scope
from precond.errors import UsageError
from precond.observe import Columns, Gradient, Kind, Observation
from precond.operators import Dense, Kronecker, KroneckerEigen, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, mean_gradient, refuse_kind, weighted_gradients, zeros
from precond.representations.centring import deviation, first_moment
from precond.representations.eigenbasis import RENEW, Bases, carry, contraction, first_basis, rotated, second_moments
from precond.representations.kron_io import KronIO
from precond.statistics import Stat

BasisOf = Literal["io", "dim"]
Basis = Literal["eigh", "qr"]
Update = Literal["before", "after"]


@REGISTRY.register("kron_eigen")
@dataclass(frozen=True, kw_only=True)
class KronEigen(Representation):
    """C ~ U diag(S) U^T, U = U_1 (x) ... (x) U_k the eigenvectors of Kronecker factors, S = diag(U^T C U) = scale * sum_ik (U^T u_ik)^2.

    S is exact, with shared positions too, so that the trace is that of C and no other diagonal in this basis is nearer to C.
    The basis belongs to the representation: what is averaged is the factors and S; the basis is made of the averaged factors, the same on
    every rank, and S is carried over when it changes. The matrix may be centred; the basis is that of the uncentred factors.

    Args:
        basis_of: "io": the factors of `kron_io`, U_B (x) U_A on [W, b] (EK-FAC); "dim": those of `kron_dim`, one a dimension of each
            tensor, from the step's gradient where the matrix has one (SOAP).
        basis: how it is renewed. "eigh": afresh, and S becomes its diagonal in the new basis, by the squared overlaps of the two;
            "qr": one step of orthogonal iteration, Q <- qr(F Q) with the columns sorted, and S is permuted likewise.
        basis_interval: observations between two renewals.
        update: "before": the basis is made of factors that hold this observation, then S is measured in it; "after": S is measured
            in the basis of the observations before, so that the first one only makes a basis.
        sharing: of the factors of "io", see `KronIO`.
        max_dim: of "dim": a longer dimension keeps the identity and has no factor; 0: every one, which leaves the diagonal.
        vectors: of "dim": whether tensors of one dimension have a basis.

    Memory 2 sum n_m^2 + prod n_m. Cost: the factors'; 10 n_m^3 a renewal ("qr" about 4 n_m^3); S takes two products a gradient by
    example, or, where positions are not shared, N K prod n_m without forming one. Columns of a step are held until its end.
    Sources: George et al. 2018, arXiv 1806.03884; Vyas et al. 2024, arXiv 2409.11321.

    Raises:
        UsageError: the operator is asked for before S was ever measured.

    >>> KronEigen(basis_of="dim", basis="qr", basis_interval=10, update="after").scope
    'tensor'
    """

    structure = KroneckerEigen
    stages = ("factors", "spectrum")
    centres = True

    basis_of: BasisOf = "io"
    basis: Basis = "eigh"
    basis_interval: int = 1
    update: Update = "before"
    sharing: Literal["expand", "reduce"] = "expand"
    max_dim: int | None = None
    vectors: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("basis_of", self.basis_of, BasisOf), ("basis", self.basis, Basis), ("update", self.update, Update)):
            if value not in get_args(known):
                raise ValueError(f"KronEigen({name}={value!r}): choose {' or '.join(map(repr, get_args(known)))}.")
        if isinstance(self.basis_interval, bool) or not isinstance(self.basis_interval, int) or self.basis_interval < 1:
            raise ValueError(f"KronEigen(basis_interval={self.basis_interval!r}): it is a number of observations, 1 or more.")
        if self.max_dim is not None and self.max_dim < 0:
            raise ValueError(f"KronEigen(max_dim={self.max_dim!r}): it is a length, 0 or more, or None for no limit.")
        if self.basis_of == "io" and (self.max_dim is not None or not self.vectors):
            raise ValueError("KronEigen: max_dim and vectors belong to basis_of='dim'.")
        if self.basis_of == "dim" and self.sharing != "expand":
            raise ValueError("KronEigen: sharing belongs to basis_of='io'.")
        KronIO(sharing=self.sharing)  # refuses a sharing that it does not have

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "matrix" if self.basis_of == "io" else "tensor"

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]
        return ("columns",) if self.basis_of == "io" else ("gradient", "columns")

    @property
    def _io(self) -> KronIO:
        return KronIO(sharing=self.sharing)

    def hosts(self, block: Block) -> str | None:
        return self._io.hosts(block) if self.basis_of == "io" else None

    def fallback(self, block: Block) -> str:
        return self._io.fallback(block)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        if self.basis_of == "io":
            factors, modes = dict(self._io.statistics(block)), [0, 1]
        else:
            modes = self._modes(block)
            factors = {f"F{m}": Stat("mean", form="matrix") for m in modes}
        bases = {f"U{m}": Stat("state") for m in modes}
        return factors | bases | {"observations": Stat("state"), "S": Stat("mean", form="diagonal")}

    def _modes(self, block: Block) -> list[int]:
        """The dimensions that have a factor, for "dim"."""
        if len(block.shape) == 1 and not self.vectors:
            return []
        return [m for m, n in enumerate(block.shape) if self.max_dim is None or n <= self.max_dim]

    def _factors(self, averages: Statistics, block: Block) -> dict[int, Tensor]:
        """Mode -> (b, n, n), of the modes that are not diagonal already."""
        if self.basis_of == "dim":
            return {m: averages[f"F{m}"].unsqueeze(0) for m in self._modes(block)}
        product = self._io.operator(averages, block)
        assert isinstance(product, Kronecker)
        return {m: F.matrix.reshape(-1, F.size, F.size) for m, F in enumerate(product.factors) if isinstance(F, Dense)}

    def prepare(self, stage: str, statistics: Statistics, averages: Callable[[], Statistics], block: Block) -> Statistics:
        seen = int(statistics.get("observations", 0))
        if stage == "factors":  # they do not hold this observation yet
            due = self.update == "after" and seen > 0 and (seen - 1) % self.basis_interval == 0
            return self._renewed(statistics, averages(), block) if due else statistics
        due = self.update == "before" and seen % self.basis_interval == 0
        return (self._renewed(statistics, averages(), block) if due else statistics) | {"observations": seen + 1}

    def _renewed(self, statistics: Statistics, averages: Statistics, block: Block) -> Statistics:
        """A basis made of the averaged factors, and S in it."""
        renewed, changes = dict(statistics), dict[int, Tensor]()
        for m, F in self._factors(averages, block).items():
            old = statistics.get(f"U{m}")
            if old is None:
                renewed[f"U{m}"] = first_basis(F)
            else:
                renewed[f"U{m}"], changes[m] = RENEW[self.basis](F, old)
        if changes and "S" in statistics:
            bases, shape = self._bases(renewed, block)
            renewed["S"] = carry(statistics["S"], [changes.get(m) for m in range(len(bases))], shape)
        return renewed

    @staticmethod
    def _bases(statistics: Statistics, block: Block) -> tuple[Bases, tuple[int, ...]]:
        """The bases by mode, and the shape (b, n_1, ..., n_k) of a vector."""
        bases = [statistics.get(f"U{m}") for m in range(len(block.shape))]
        stack = next((U.shape[0] for U in bases if U is not None), 1)
        return bases, (stack, block.shape[0] // stack, *block.shape[1:])

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if stage == "factors":
            return (
                self._io.measure("all", observation, block, statistics) if self.basis_of == "io" else self._contractions(observation, block)
            )
        if self.update == "after" and statistics["observations"] == 1:
            return {}
        bases, shape = self._bases(statistics, block)
        if isinstance(observation, Gradient):
            return {"S": rotated(bases, mean_gradient(observation, block).unsqueeze(0), shape).square().squeeze(0)}
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        return {"S": second_moments(observation, block, bases, shape)} | first_moment(observation, block)

    def _contractions(self, observation: Observation, block: Block) -> Statistics:
        modes = self._modes(block)
        if isinstance(observation, Gradient):
            rows = mean_gradient(observation, block).unsqueeze(0)
            return {f"F{m}": contraction(rows, block.shape, m) for m in modes}
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        total = {f"F{m}": zeros(block, block.shape[m], block.shape[m]) for m in modes}
        for rows in weighted_gradients(observation, block) if modes else ():
            total = {f"F{m}": total[f"F{m}"] + contraction(rows, block.shape, m) for m in modes}
        return total

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        if "S" not in statistics:
            raise UsageError(
                "KronEigen(update='after') makes a basis of its first observation and measures nothing in it: use update='before'."
            )
        bases, shape = self._bases(statistics, block)
        S, mean = statistics["S"], deviation(statistics)
        if mean is not None:
            S = S - rotated(bases, mean.unsqueeze(0), shape).square().squeeze(0)
        return KroneckerEigen(bases, S.reshape(shape))

    def bytes_held(self, block: Block, itemsize: int) -> int:
        factors = self._io.bytes_held(block, 1) if self.basis_of == "io" else sum(block.shape[m] ** 2 for m in self._modes(block))
        return (2 * factors + block.n) * itemsize
