"""Kronecker product over the dimensions of a tensor: Shampoo, TNT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Gradient, Kind, Observation
from precond.operators import BlockDiagonal, Diagonal, Fit, Kronecker, KroneckerSum, Operator
from precond.representations.base import REGISTRY, Representation, Statistics, mean_gradient, refuse_kind, weighted_gradients, zeros
from precond.representations.dimensions import Dimensions, FactorForm, Merge, Modes, Oversized, contraction, key, tiled
from precond.representations.fitted import PROBES, over_probes
from precond.representations.prewhitening import inverse_root, whitened_contraction
from precond.statistics import Stat

Normalisation = Literal["geometric", "trace", "power", "kl"]


@REGISTRY.register("kron_dim")
@dataclass(frozen=True, kw_only=True)
class KronDim(Representation):
    """One factor a dimension of each parameter tensor, F_m = (1/N) sum_ik G_(m) G_(m)^T of the mode-m unfoldings.

    A vector has one dense factor. Every parameter tensor is a block of its own. What is not the plain shape of a tensor, `describe()` shows.

    Args:
        normalisation: with k factors that are not the identity. "geometric" (Shampoo): C ~ F_1^(1/k) (x) ... (x) F_k^(1/k), so that the
            power -1/2 gives the published exponent -1/(2k). "trace" (TNT): C ~ F_1 (x) ... (x) F_k / t^(k-1) with t the common trace,
            exact where C is a Kronecker product; divided by the size of the dimensions that have the identity, so that the trace is t.
            "power" (CASPR): C ~ ((1/k) sum_m (I (x) F_m (x) I)^r)^(1/r) with r = -1/(2k), of which "geometric" is the limit r -> 0, so that
            the power -1/2 is the mean of F_m^(-1/(2k)) over the dimensions, applied k times; all of them have factors then.
            "kl" (KL-Shampoo): C ~ F_1 (x) ... (x) F_k, and G is first multiplied by F_j^(-1/2) along every other dimension j and divided by
            prod_{j != m} n_j^(1/2): the fixed point minimises the Kullback-Leibler divergence between normal distributions of covariance C.
            All are measured with the old roots, which overshoots where there are more than two factors: merge dimensions, or whiten rarely.
        whiten_damping, whiten_interval: of "kl": (F_j + whiten_damping I)^(-1/2), I at first, made anew from the averages before every
            so many observations.
        squeeze, merge_dims, max_dim, oversized, modes, max_skew: see `Dimensions`. One mode alone is one-sided Shampoo (ASGO): F (x) I, whose power
            -1/2 is the published exponent. A tensor none of whose dimensions has a factor takes the fallback.

    Memory sum n_m^2 a tile, twice that for "kl"; cost k * prod n * max n a gradient, k times that and 10 sum n_m^3 an interval for "kl".
    Sources: Gupta, Koren & Singer 2018; Ren & Goldfarb 2021; Shi et al. 2023, arXiv 2309.06497 (tiles); An et al. 2025, arXiv 2503.20762
    and Xie et al. 2025, arXiv 2503.10537 (one side); Duvvuri et al. 2024 (CASPR); Lin et al. 2025, arXiv 2509.03378 (KL-Shampoo).

    >>> KronDim(merge_dims="rest", max_dim=512).remark((64, 3, 3, 3)), KronDim(max_dim=512).remark((784, 512))
    ('(64, 3, 3, 3) as 64 x 27', '784 x 512 in 2 tiles of 392 x 512')
    """

    scope = "tensor"
    requests = ("gradient", "columns")
    followed = PROBES
    fit = "kronecker"

    normalisation: Normalisation = "geometric"
    squeeze: bool = False
    merge_dims: Merge = "none"
    max_dim: int | None = None
    oversized: Oversized = "tile"
    modes: Modes = "all"
    max_skew: float | None = None
    whiten_damping: float = 1e-6
    whiten_interval: int = 1

    def __post_init__(self) -> None:
        if self.normalisation not in get_args(Normalisation):
            raise ValueError(f"KronDim(normalisation={self.normalisation!r}): choose {' or '.join(map(repr, get_args(Normalisation)))}.")
        if not 0 <= self.whiten_damping < math.inf or self.whiten_interval < 1:
            raise ValueError(
                f"KronDim(whiten_damping={self.whiten_damping}, whiten_interval={self.whiten_interval}): they are finite and at least 0, and at least 1."
            )
        if self.normalisation == "power" and (self.modes != "all" or self.oversized == "identity"):
            raise ValueError("KronDim(normalisation='power') is a mean over all dimensions: it needs modes='all', and oversized='tile' or 'diagonal'.")
        if isinstance(self.modes, list):  # as a recipe has it
            object.__setattr__(self, "modes", tuple(self.modes))
        self._dimensions.check("KronDim")

    @property
    def structure(self) -> type[Operator]:  # type: ignore[override]
        return KroneckerSum if self.normalisation == "power" else Kronecker

    @property
    def _dimensions(self) -> Dimensions:
        return Dimensions(
            squeeze=self.squeeze, merge_dims=self.merge_dims, max_dim=self.max_dim, oversized=self.oversized, modes=self.modes,
            max_skew=self.max_skew,
        )  # fmt: skip

    def hosts(self, block: Block) -> str | None:
        if all(form == "identity" for form in self._dimensions.forms(block.shape)):
            return f"none of its dimensions {tuple(block.shape)} has a factor under these modes and this max_dim"
        return None

    def coordinates(self, block: Block) -> Block:
        return replace(block, tiling=self._dimensions.tiling(block.shape))

    def remark(self, shape: tuple[int, ...]) -> str | None:
        return self._dimensions.remark(shape)

    def _factors(self, block: Block) -> Iterator[tuple[str, int, int, FactorForm, tuple[int, ...]]]:
        """Name, mode, group, form and shape of every factor that is kept."""
        for g, (b, *sizes) in enumerate(tiled(block).groups):
            for m, form in enumerate(self._dimensions.forms(block.shape)):
                ends = (sizes[m],) if form == "diagonal" else (sizes[m], sizes[m])
                if form != "identity":
                    yield key("F", m, g), m, g, form, ((b, *ends) if b > 1 else ends)

    def over(self, kind: Kind) -> Representation:
        return over_probes(self, kind)

    def fits(self, block: Block) -> tuple[Fit, ...]:
        forms = self._dimensions.forms(block.shape)
        return tuple(Fit(tuple(sizes), forms, batch=b) for b, *sizes in tiled(block).groups)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        factors = {name: Stat("mean", form="diagonal" if form == "diagonal" else "matrix") for name, _, _, form, _ in self._factors(block)}
        if self.normalisation != "kl":
            return factors
        return factors | {key("R", m, g): Stat("state") for _, m, g, *_ in self._factors(block)} | {"observations": Stat("state")}

    def prepare(self, stage: str, statistics: Statistics, averages: Callable[[], Statistics], block: Block) -> Statistics:
        if self.normalisation != "kl":
            return statistics
        seen = int(statistics.get("observations", 0))
        roots: Statistics = {}
        if seen and seen % self.whiten_interval == 0:
            known, groups = averages(), tiled(block).groups
            for name, m, g, form, shape in self._factors(block):
                stack = known[name].reshape(groups[g][0], *shape[-1 if form == "diagonal" else -2 :])
                roots[key("R", m, g)] = inverse_root(stack, form, self.whiten_damping)
        return statistics | roots | {"observations": seen + 1}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if isinstance(observation, Gradient):
            return self._contractions(mean_gradient(observation, block).unsqueeze(0), block, statistics)
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        total = {name: zeros(block, *shape) for name, *_, shape in self._factors(block)}
        for rows in weighted_gradients(observation, block):
            for name, found in self._contractions(rows, block, statistics).items():
                total[name] = total[name] + found
        return total

    def _contractions(self, rows: Tensor, block: Block, statistics: Statistics) -> Statistics:
        tiles, groups = tiled(block).split(rows), tiled(block).groups
        if self.normalisation != "kl":
            return {name: contraction(tiles[g], m, form).reshape(shape) for name, m, g, form, shape in self._factors(block)}
        roots = [[statistics.get(key("R", m, g)) for m in range(len(group) - 1)] for g, group in enumerate(groups)]
        return {name: whitened_contraction(tiles[g], roots[g], m, form).reshape(shape) for name, m, g, form, shape in self._factors(block)}

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        groups = tiled(block).groups
        products = [self._product(statistics, g, group, block) for g, group in enumerate(groups)]
        return products[0] if len(products) == 1 else BlockDiagonal({str(g): product for g, product in enumerate(products)})

    def _product(self, statistics: Statistics, g: int, group: tuple[int, ...], block: Block) -> Kronecker | KroneckerSum:
        b, *sizes = group
        forms = self._dimensions.forms(block.shape)
        kept = {m: statistics[key("F", m, g)] for m, form in enumerate(forms) if form != "identity"}
        like, lead = next(iter(kept.values())), (b,) if b > 1 else ()
        factors = [
            kept[m] if forms[m] == "dense" else Diagonal(kept[m] if m in kept else like.new_ones(()).expand(*lead, n))
            for m, n in enumerate(sizes)
        ]
        if self.normalisation == "geometric":
            return Kronecker(*factors, exponent=1.0 / len(kept))
        if self.normalisation == "kl":
            return Kronecker(*factors)
        if self.normalisation == "power":
            k = len(factors)
            exponent = -1 / (2 * k) if k > 1 else 1.0
            return KroneckerSum(*factors, exponent=exponent, scale=float(k) ** (-1 / exponent))
        others = torch.Size([n for m, n in enumerate(sizes) if m not in kept]).numel()
        first = next(iter(kept))
        trace = (kept[first].diagonal(dim1=-2, dim2=-1) if forms[first] == "dense" else kept[first]).sum(-1)
        return Kronecker(*factors, scale=torch.where(trace > 0, trace, torch.ones_like(trace)) ** (1 - len(kept)) / others)

    def bytes_held(self, block: Block, itemsize: int) -> int:
        numbers = sum(torch.Size(shape).numel() for *_, shape in self._factors(self.coordinates(block)))
        return (2 if self.normalisation == "kl" else 1) * numbers * itemsize
