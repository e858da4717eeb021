"""Block-diagonal by output unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.blocks import Block, Scope
from precond.observe import Columns, Factors, Gradient, Kind, Observation, Product
from precond.operators import Dense, Fit, Operator, Repeated
from precond.representations.base import (
    REGISTRY,
    Representation,
    Statistics,
    mean_gradient,
    product_columns,
    refuse_kind,
    weighted_gradients,
    zeros,
)
from precond.representations.centring import deviation, first_moment
from precond.representations.fitted import PROBES
from precond.representations.inputs import unit_blocks
from precond.representations.secant import over_pairs
from precond.representations.unshared import unshared_rows
from precond.statistics import Stat


@REGISTRY.register("unit")
@dataclass(frozen=True, kw_only=True)
class Unit(Representation):
    """One dense block an output unit: row o of [W, b] of a layer with such rows, (gamma_j, beta_j) of a normalisation.

    An Embedding's units are its vocabulary rows. Of any other module each parameter tensor has its rows as units, and
    a vector its entries. Exactly sub-blocks of `layer`. Memory out * in'^2; without shared positions the blocks are
    (scale) sum_ik g_iko^2 a_i a_i^T and no gradient by example is formed. Sources: Kurita 1994; Le Roux et al. 2007;
    Ollivier 2015.

    Args:
        block: "row": the above. "kernel": mini-blocks, every tensor by itself: of a convolution one block a kernel (out, in), prod(kernel) square, and
            so of any tensor of order 3 or more; of a matrix one a row, without the homogeneous 1; of a vector, such as a bias, its entries.
            Memory prod(n) prod(kernel). Source: Bahamou, Goldfarb & Ren 2023, arXiv 2202.04124.
        shared: "matrices": the units of a weight of two dimensions, of a fully connected layer say, share one block, the mean of theirs
            (same source). Memory in'^2.

    >>> Unit().scope, Unit(block="kernel").scope
    ('matrix', 'kernel')
    """

    centres = True
    structure = Dense
    fit = "dense"

    block: Literal["row", "kernel"] = "row"
    shared: Literal["none", "matrices"] = "none"

    def __post_init__(self) -> None:
        if self.block not in ("row", "kernel"):
            raise ValueError(f"Unit(block={self.block!r}): choose 'row' or 'kernel'.")
        if self.shared not in ("none", "matrices"):
            raise ValueError(f"Unit(shared={self.shared!r}): choose 'none' or 'matrices'.")

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "matrix" if self.block == "row" else "kernel"

    @property
    def requests(self) -> tuple[Kind, ...]:  # type: ignore[override]
        moments: tuple[Kind, ...] = ("factors",) if self.block == "row" else ()  # a bias by itself has no input
        pairs: tuple[Kind, ...] = ("secant", "successive") if self.shared == "none" else ()  # each unit has a pair of its own
        return ("columns", "gradient", "product", *moments, *pairs)

    @property
    def followed(self) -> tuple[Kind, ...]:  # type: ignore[override]
        return PROBES if self.shared == "none" else ()

    def _shares(self, block: Block) -> bool:
        """Whether the units of a block share one."""
        return self.shared == "matrices" and any(len(p.shape) == 2 for p in block.parameters)

    def remark(self, shape: tuple[int, ...]) -> str | None:
        if self.shared == "matrices" and len(shape) == 2:
            return "one block, shared by its units"
        if self.block == "row" or len(shape) < 3:
            return None
        return f"{math.prod(shape[:2])} kernels of {math.prod(shape[2:])}"

    def over(self, kind: Kind) -> Representation:
        return over_pairs(self, kind, "rows")

    def fits(self, block: Block) -> tuple[Fit, ...]:
        rows, width = block.shape
        return (Fit((width,), ("dense",), batch=rows),)

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        return {"blocks": Stat("mean", form="matrix")}

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        rows, width = block.shape
        shares = self._shares(block)
        if isinstance(observation, Gradient):
            gradient = mean_gradient(observation, block).view(rows, width)
            return {"blocks": _mean_outer(gradient) if shares else gradient.unsqueeze(2) * gradient.unsqueeze(1)}
        if isinstance(observation, Columns):
            return {"blocks": (_shared_from_columns if shares else _from_columns)(observation, block)} | first_moment(observation, block)
        if isinstance(observation, Factors):
            inputs = unit_blocks(observation, block)
            made = zeros(block, rows, width, width) if inputs is None else inputs
            return {"blocks": made.mean(0) if shares else made}
        if not isinstance(observation, Product):
            raise refuse_kind(self, observation)
        blocks = zeros(block, rows, width, width)
        for indices, products in product_columns(observation, block):
            unit, place = indices // width, indices % width
            blocks[unit, place] = products.view(len(indices), rows, width)[torch.arange(len(indices)), unit]
        return {"blocks": blocks.mean(0) if shares else blocks}

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        blocks, mean = statistics["blocks"], deviation(statistics)
        if mean is not None:
            unit_means = mean.view(block.shape)
            blocks = blocks - (_mean_outer(unit_means) if self._shares(block) else unit_means.unsqueeze(2) * unit_means.unsqueeze(1))
        return Repeated(Dense(blocks), block.shape[0]) if self._shares(block) else Dense(blocks)

    def bytes_held(self, block: Block, itemsize: int) -> int:
        rows, width = block.shape
        return (1 if self._shares(block) else rows) * width**2 * itemsize


def _mean_outer(units: Tensor) -> Tensor:
    """The mean over units (rows, width) of their outer products."""
    return units.mT @ units / len(units)


def _shared_from_columns(observation: Columns, block: Block) -> Tensor:
    rows, width = block.shape
    unshared = unshared_rows(observation, block)
    if unshared is not None and all((rows, width) == (g.shape[1], a.shape[1]) for g, a in unshared):
        return torch.stack([(a * g.square().sum(1, keepdim=True)).T @ a for g, a in unshared]).sum(0) / rows
    total = zeros(block, width, width)
    for gradients in weighted_gradients(observation, block):
        units = gradients.reshape(-1, width)
        total = total + units.T @ units
    return total / rows


def _from_columns(observation: Columns, block: Block) -> Tensor:
    rows, width = block.shape
    unshared = unshared_rows(observation, block)
    if unshared is not None and all((rows, width) == (g.shape[1], a.shape[1]) for g, a in unshared):
        squares, inputs = torch.cat([g.square() for g, _ in unshared]), torch.cat([a for _, a in unshared])
        return torch.stack([(inputs * square.unsqueeze(1)).T @ inputs for square in squares.unbind(1)])
    total = zeros(block, rows, width, width)
    for gradients in weighted_gradients(observation, block):
        units = gradients.view(-1, rows, width)
        total = total + torch.einsum("bri,brj->rij", units, units)
    return total
