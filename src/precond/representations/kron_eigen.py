"""Kronecker eigenbasis with the exact diagonal in it: EK-FAC, SOAP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.blocks import Block, Scope
from precond.errors import UsageError
from precond.observe import Columns, Gradient, Kind, Observation
from precond.operators import BlockDiagonal, Dense, Kronecker, KroneckerEigen, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, mean_gradient, refuse_kind, weighted_gradients, zeros
from precond.representations.centring import deviation, first_moment
from precond.representations.dimensions import Dimensions, Merge, Modes, Oversized, contraction, key, tiled
from precond.representations.eigenbasis import RENEW, Group, carry, first_basis, second_moments, turned
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
        squeeze, merge_dims, max_dim, oversized, modes, vectors: of "dim", see `Dimensions`. A longer dimension than `max_dim` keeps the identity,
            0: every one, which leaves the diagonal; or oversized="tile".

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
    squeeze: bool = False
    merge_dims: Merge = "none"
    max_dim: int | None = None
    oversized: Oversized = "identity"
    modes: Modes = "all"
    vectors: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("basis_of", self.basis_of, BasisOf), ("basis", self.basis, Basis), ("update", self.update, Update)):
            if value not in get_args(known):
                raise ValueError(f"KronEigen({name}={value!r}): choose {' or '.join(map(repr, get_args(known)))}.")
        if isinstance(self.basis_interval, bool) or not isinstance(self.basis_interval, int) or self.basis_interval < 1:
            raise ValueError(f"KronEigen(basis_interval={self.basis_interval!r}): it is a number of observations, 1 or more.")
        if isinstance(self.modes, list):  # as a recipe has it
            object.__setattr__(self, "modes", tuple(self.modes))
        self._dimensions.check("KronEigen")
        if self.oversized == "diagonal":
            raise ValueError(
                "KronEigen(oversized='diagonal'): the basis of a diagonal factor is the identity: choose 'identity' or 'tile'."
            )
        if self.basis_of == "io" and self._dimensions != Dimensions(oversized="identity"):
            raise ValueError("KronEigen: squeeze, merge_dims, max_dim, oversized, modes and vectors belong to basis_of='dim'.")
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
    def _dimensions(self) -> Dimensions:
        return Dimensions(
            squeeze=self.squeeze,
            merge_dims=self.merge_dims,
            max_dim=self.max_dim,
            oversized=self.oversized,
            modes=self.modes,
            vectors=self.vectors,
        )

    @property
    def _io(self) -> KronIO:
        return KronIO(sharing=self.sharing)

    def hosts(self, block: Block) -> str | None:
        return self._io.hosts(block) if self.basis_of == "io" else None

    def coordinates(self, block: Block) -> Block:
        return block if self.basis_of == "io" else replace(block, tiling=self._dimensions.tiling(block.shape))

    def remark(self, shape: tuple[int, ...]) -> str | None:
        return None if self.basis_of == "io" else self._dimensions.remark(shape)

    def fallback(self, block: Block) -> str:
        return self._io.fallback(block)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        if self.basis_of == "io":
            factors, bases = dict(self._io.statistics(block)), ["U0", "U1"]
        else:
            factors = {key("F", m, g): Stat("mean", form="matrix") for m, g in self._modes(block)}
            bases = [key("U", m, g) for m, g in self._modes(block)]
        return factors | dict.fromkeys(bases, Stat("state")) | {"observations": Stat("state"), "S": Stat("mean", form="diagonal")}

    def _modes(self, block: Block) -> list[tuple[int, int]]:
        """The dimensions that have a factor, for "dim", of every group of tiles."""
        forms = self._dimensions.forms(block.shape)
        return [(m, g) for g in range(len(tiled(block).groups)) for m, form in enumerate(forms) if form == "dense"]

    def _factors(self, averages: Statistics, block: Block) -> dict[tuple[int, int], Tensor]:
        """(mode, group) -> (b, n, n), of the modes that are not diagonal already."""
        if self.basis_of == "dim":
            return {(m, g): averages[key("F", m, g)] for m, g in self._modes(block)}
        product = self._io.operator(averages, block)
        assert isinstance(product, Kronecker)
        return {(m, 0): F.matrix.reshape(-1, F.size, F.size) for m, F in enumerate(product.factors) if isinstance(F, Dense)}

    def prepare(self, stage: str, statistics: Statistics, averages: Callable[[], Statistics], block: Block) -> Statistics:
        seen = int(statistics.get("observations", 0))
        if stage == "factors":  # they do not hold this observation yet
            due = self.update == "after" and seen > 0 and (seen - 1) % self.basis_interval == 0
            return self._renewed(statistics, averages(), block) if due else statistics
        due = self.update == "before" and seen % self.basis_interval == 0
        return (self._renewed(statistics, averages(), block) if due else statistics) | {"observations": seen + 1}

    def _renewed(self, statistics: Statistics, averages: Statistics, block: Block) -> Statistics:
        """A basis made of the averaged factors, and S in it."""
        renewed, changes = dict(statistics), dict[tuple[int, int], Tensor]()
        for (m, g), F in self._factors(averages, block).items():
            name = key("U", m, g)
            old = statistics.get(name)
            if old is None:
                renewed[name] = first_basis(F)
            else:
                renewed[name], changes[m, g] = RENEW[self.basis](F, old)
        if changes and "S" in statistics:
            groups = self._groups(renewed, block)
            parts = statistics["S"].split([math.prod(shape) for _, shape in groups], -1)
            carried = [
                carry(S, [changes.get((m, g)) for m in range(len(bases))], shape)
                for g, (S, (bases, shape)) in enumerate(zip(parts, groups, strict=True))
            ]
            renewed["S"] = torch.cat(carried, -1)
        return renewed

    def _groups(self, statistics: Statistics, block: Block) -> list[Group]:
        """The bases by mode, and the shape (b, n_1, ..., n_k) of a vector, group by group of tiles."""
        if self.basis_of == "dim":
            shapes = tiled(block).groups
            return [([statistics.get(key("U", m, g)) for m in range(len(shape) - 1)], shape) for g, shape in enumerate(shapes)]
        bases = [statistics.get(f"U{m}") for m in range(2)]
        stack = next((U.shape[0] for U in bases if U is not None), 1)
        return [(bases, (stack, block.shape[0] // stack, *block.shape[1:]))]

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if stage == "factors":
            return (
                self._io.measure("all", observation, block, statistics) if self.basis_of == "io" else self._contractions(observation, block)
            )
        if self.update == "after" and statistics["observations"] == 1:
            return {}
        groups = self._groups(statistics, block)
        if isinstance(observation, Gradient):
            return {"S": turned(groups, mean_gradient(observation, block).unsqueeze(0)).square().squeeze(0)}
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        return {"S": second_moments(observation, block, groups)} | first_moment(observation, block)

    def _contractions(self, observation: Observation, block: Block) -> Statistics:
        modes, tiling = self._modes(block), tiled(block)
        if isinstance(observation, Gradient):
            tiles = tiling.split(mean_gradient(observation, block).unsqueeze(0))
            return {key("F", m, g): contraction(tiles[g], m) for m, g in modes}
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        groups = tiling.groups
        total = {key("F", m, g): zeros(block, groups[g][0], groups[g][m + 1], groups[g][m + 1]) for m, g in modes}
        for rows in weighted_gradients(observation, block) if modes else ():
            tiles = tiling.split(rows)
            total = {key("F", m, g): total[key("F", m, g)] + contraction(tiles[g], m) for m, g in modes}
        return total

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        if "S" not in statistics:
            raise UsageError(
                "KronEigen(update='after') makes a basis of its first observation and measures nothing in it: use update='before'."
            )
        groups = self._groups(statistics, block)
        S, mean = statistics["S"], deviation(statistics)
        if mean is not None:
            S = S - turned(groups, mean.unsqueeze(0)).square().squeeze(0)
        parts = S.split([math.prod(shape) for _, shape in groups])
        made = [KroneckerEigen(bases, part.reshape(shape)) for part, (bases, shape) in zip(parts, groups, strict=True)]
        return made[0] if len(made) == 1 else BlockDiagonal({str(g): C for g, C in enumerate(made)})

    def bytes_held(self, block: Block, itemsize: int) -> int:
        if self.basis_of == "io":
            factors = self._io.bytes_held(block, 1)
        else:
            held = self.coordinates(block)
            groups = tiled(held).groups
            factors = sum(groups[g][0] * groups[g][m + 1] ** 2 for m, g in self._modes(held))
        return (2 * factors + block.n) * itemsize
