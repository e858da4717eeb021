"""A representation: how C is held. Observation -> statistics that add, and statistics -> operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from precond.blocks import Block, Scope
from precond.errors import ObservationError
from precond.observe import Columns, Factors, Gradient, Kind, Observation, Product, Tensors
from precond.operators import Fit, FitName, Operator
from precond.registry import Registry
from precond.representations.inputs import moment_matrix
from precond.statistics import Stat

Statistics = dict[str, Any]
_PROBES = 64  # columns of a dense block taken from a live product at once


@dataclass(frozen=True, kw_only=True)
class Representation(ABC):
    """One way to hold a curvature matrix.

    scope: what a block is. requests: the kinds of observation it can be built from, in order of preference.
    structure: the operator it makes. A statistic must add over micro-batches, ranks and steps; what is not linear
    (roots, centring, outer products of a mean) belongs into `operator`, which is pure.
    """

    name: ClassVar[str]
    scope: ClassVar[Scope]
    requests: ClassVar[tuple[Kind, ...]]
    structure: ClassVar[type[Operator]]
    stages: ClassVar[tuple[str, ...]] = ("all",)
    after: ClassVar[tuple[str, ...]] = ()
    """Stages that are measured after the optimizer's update."""
    followed: ClassVar[tuple[Kind, ...]] = ()
    """Kinds of observation it has a form for, beside those it is built from, where a solver follows them."""
    fit: ClassVar[FitName | None] = None
    """What a solver that follows pairs is to fit."""
    averaged: ClassVar[bool] = True
    """Whether a history may average what it keeps: pairs make a matrix from the one before, and are averaged there."""
    centres: ClassVar[bool] = False
    """Whether the outer product of a mean can be taken off its form."""

    @property
    def definite(self) -> bool:
        """Whether its operator is positive semi-definite whatever the matrix is."""
        return False

    @property
    def rows(self) -> Stat | None:
        """How the rows merge that it keeps, where it keeps any: not every history can."""
        return None

    def centring(self) -> Mapping[str, Stat]:
        """What it keeps beside for a matrix that is centred."""
        return {"first": Stat("mean"), "count": Stat("mean")}

    @property
    def beside(self) -> Mapping[str, tuple[str, Kind]]:
        """Stages that are measured from another matrix than its own: that one's name, and the kind of observation."""
        return {}

    @property
    def live(self) -> bool:
        """Its operator holds a function and lives one step."""
        return self.structure.live

    def over(self, kind: Kind) -> Representation:
        """What it becomes where it is built from one kind of observation; itself for most."""
        return self

    def fits(self, block: Block) -> tuple[Fit, ...]:
        """What a solver that follows pairs is to fit, one after another along the block's coordinates."""
        raise NotImplementedError(f"{self.name} has no structure to fit to pairs.")

    def hosts(self, block: Block) -> str | None:
        """Why it has no meaning for a block, or None."""
        return None

    def coordinates(self, block: Block) -> Block:
        """The block in the coordinates in which it is held."""
        return block

    def remark(self, shape: tuple[int, ...]) -> str | None:
        """How a tensor is held, for `describe()`, where that is not plain from its shape."""
        return None

    def fallback(self, block: Block) -> str:
        """The representation a block takes that this one cannot host."""
        return "diagonal"

    @abstractmethod
    def statistics(self, block: Block) -> Mapping[str, Stat]:
        """What it keeps, by name, and how each entry merges."""

    @abstractmethod
    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        """This step's statistics, normalised by the weights of the observation's parts."""

    def prepare(self, stage: str, statistics: Statistics, averages: Callable[[], Statistics], block: Block) -> Statistics:
        """Before a stage is measured, on every rank alike: the statistics, with a new basis where one is due.

        averages: reads the averages of what was merged so far, the earlier stages of this step included. What is set here is of kind
        "state", and an averaged entry may be carried over to a new basis; neither its weight nor another entry changes.
        """
        return statistics

    def rebase(self, statistics: Statistics) -> Statistics:
        """At a refresh only: a new basis, index set or sketch."""
        return statistics

    @abstractmethod
    def operator(self, statistics: Statistics, block: Block) -> Operator:
        """The operator that the statistics stand for; pure."""

    def bytes_held(self, block: Block, itemsize: int) -> int:
        """Bytes of statistics for a block."""
        return 0


REGISTRY: Registry[Representation] = Registry("representations", Representation)  # type: ignore[type-abstract]


def refuse_kind(representation: Representation, observation: Observation) -> ObservationError:
    """The error for a kind of observation that was not requested."""
    return ObservationError(f"the representation {representation.name!r} cannot be built from {type(observation).__name__}.")


def weighted_gradients(observation: Columns, block: Block) -> Iterator[Tensor]:
    """Rows u (m, n) in block coordinates, weight and scale folded in, so that C = sum over chunks of u^T u."""
    for part in observation.parts:
        factor = part.share * part.scale
        for gradients in block.gradients(part):
            yield gradients.flatten(0, 1) * factor.abs().sqrt().to(gradients.dtype)


def mean_gradient(observation: Gradient, block: Block) -> Tensor:
    """The gradient of the step in block coordinates, (n,), in at least float32."""
    gradient = block.gather(observation.values)
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient


def product_columns(observation: Product, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, the rows C e_i of the block) by products with unit vectors, a bounded number at a time."""
    like = next(iter(_parameters(block)))
    for indices in torch.arange(block.n).split(_PROBES):
        probes = torch.zeros(len(indices), block.n, dtype=like.dtype, device=like.device)
        probes[torch.arange(len(indices)), indices] = 1.0
        yield indices, block.gather(observation.local(block.scatter(probes)), lead=1)


def multiplied(product: Callable[[Tensors], Tensors], V: Tensor, block: Block) -> Tensor:
    """C v for each row v of V (k, n), by a live product that takes a bounded number at a time in the dtype of the parameters."""
    like = next(iter(_parameters(block)))
    return torch.cat([block.gather(product(block.scatter(some.to(like.dtype))), lead=1).to(V.dtype) for some in V.split(_PROBES)])


def _parameters(block: Block) -> Iterator[Tensor]:
    for layer in block.layers.values():
        for local, name in layer.parameters.items():
            if name in block.names:
                yield layer.tensor(local)


def dense_matrix(observation: Observation, block: Block) -> Tensor:
    """The exact dense block of C, (n, n), from any kind of observation."""
    if isinstance(observation, Gradient):
        gradient = mean_gradient(observation, block)
        return torch.outer(gradient, gradient)
    if isinstance(observation, Factors):
        return moment_matrix(observation, block)
    if isinstance(observation, Product):
        return torch.cat([rows for _, rows in product_columns(observation, block)])
    assert isinstance(observation, Columns)  # what is made of pairs is no average
    total: Tensor | None = None
    for rows in weighted_gradients(observation, block):
        product = rows.T @ rows
        total = product if total is None else total + product
    return zeros(block, block.n, block.n) if total is None else total


def zeros(block: Block, *shape: int) -> Tensor:
    """Zeros in the dtype statistics of the block are kept in: a layer that nothing came back to contributes nothing."""
    like = next(iter(_parameters(block)))
    dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
    return torch.zeros(shape, dtype=dtype, device=like.device)
