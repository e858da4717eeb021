"""What the solvers that factorise have in common: dense stacks, and Kronecker products factor by factor."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping, Factored, Tikhonov
from precond.errors import SolverFailure
from precond.numerics import ROUNDING
from precond.operators import BlockDiagonal, Dense, Diagonal, Kronecker, Operator, Shifted, mode_products, pack, unpack
from precond.operators.base import number
from precond.operators.kronecker import matrices
from precond.operators.modes import mode_product
from precond.solvers.base import Solver, State

Applied = Literal["auto", "solve", "inverse"]


class FactorSolver(Solver):
    """A solver that factorises matrices: a dense one, or each factor of a Kronecker one.

    A member writes three functions of stacks of matrices, and has an option `applied`, how a factorised matrix is applied. "solve":
    two triangular solves. "inverse": one product with the inverse, formed at the refresh. "auto": by cost. Forming the inverse of an (n, n)
    matrix costs as much as solving for `break_even` n columns costs more than multiplying them. So a matrix is solved with until it has been applied to so
    many columns since its refresh, those of the present application counted, and multiplied with from then on: a factor of K-FAC has
    as many columns a step as the other one has rows, a dense matrix has one. The three agree to rounding.
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({Dense, Kronecker})
    break_even: ClassVar[float]
    applied: Applied

    def __post_init__(self) -> None:
        if self.applied not in get_args(Applied):
            raise ValueError(f"{type(self).__name__}(applied={self.applied!r}): choose 'auto', by cost, 'solve' or 'inverse'.")

    def natural_damping(self, structure: type[Operator]) -> type[Damping]:
        return Factored if issubclass(structure, Kronecker) else Tikhonov

    @abstractmethod
    def _factorise(self, A: Tensor) -> State:
        """The factorisation of symmetric matrices (..., n, n); raises `SolverFailure`."""

    @abstractmethod
    def _invert(self, state: State) -> Tensor:
        """A^-1, symmetric."""

    @abstractmethod
    def _solve(self, state: State, V: Tensor) -> Tensor:
        """A^-1 V for V (..., n, k)."""

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        damped = self.damped(operator, damping)
        if isinstance(damped, Shifted) and isinstance(damped.operator, Dense):
            damped = damped.operator.plus(damped.shift)
        if isinstance(damped, Dense):
            return self._node(damped)
        if isinstance(damped, Kronecker):
            damped = damped.materialise()
            nodes = {str(m): self._node(F) for m, F in enumerate(damped.factors)}
            scale = 1 / damped.scale if isinstance(damped.scale, float) and damped.scale else 1 / number(damped.scale, damped)
            if isinstance(scale, Tensor) and not bool(scale.isfinite().all()):
                raise SolverFailure(f"the {self.name} solver was given a Kronecker operator of scale 0, which is singular.")
            return {"factors": nodes, "scale": scale, "sizes": (damped.batch.numel(), *damped.sizes)}
        self.refuse(damped, "its damping is not factor-wise; use Factored damping, or the 'eigen' solver, which adds it exactly")

    def _node(self, F: Operator) -> State:
        """What is kept of a matrix: its factorisation and how many columns it was applied to, or its inverse."""
        if isinstance(F, (BlockDiagonal, Diagonal)):
            return {"inverse": pack(self.inverse(F))}
        F = matrices(F)
        assert isinstance(F, Dense)
        node = self._factorise(F.matrix) | {"columns": 0}
        return self._inverted(node) if self.applied == "inverse" else node

    def _inverted(self, node: State) -> State:
        return {"inverse": pack(Dense(self._invert(node)))}

    def inverse(self, F: Operator) -> Operator:
        """The inverse of a factor of a Kronecker product, damped already."""
        if isinstance(F, BlockDiagonal):
            return F.with_blocks({name: self.inverse(block) for name, block in F.blocks.items()})
        F = matrices(F)
        if isinstance(F, Dense):
            return Dense(self._invert(self._factorise(F.matrix)))
        reciprocal = F.values.reciprocal()
        if not bool(reciprocal.isfinite().all()) or (self.needs_definite and bool((reciprocal < 0).any())):
            self._fail("a diagonal factor", F.values.shape)
        return Diagonal(reciprocal)

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        if "factors" not in state:
            node = self._settled(state, V.shape[1])
            return self._multiplied(node, V), node
        sizes, X = state["sizes"], V.reshape(*state["sizes"], V.shape[1])
        nodes = {m: self._settled(node, X[0].numel() // sizes[int(m) + 1]) for m, node in state["factors"].items()}
        for m, node in nodes.items():
            X = self._along(node, X, int(m) + 1)
        scale = state["scale"]
        if isinstance(scale, Tensor) and scale.dim():
            scale = scale.to(X.dtype).reshape(-1, *[1] * (X.dim() - 1))
        return (X if isinstance(scale, float) and scale == 1 else scale * X).reshape(V.shape), state | {"factors": nodes}

    def _settled(self, node: State, columns: int) -> State:
        """The node with which so many columns more are multiplied."""
        if "inverse" in node or self.applied == "solve":
            return node
        total = node["columns"] + columns
        return self._inverted(node) if total >= self.break_even * node["factor"].shape[-1] else node | {"columns": total}

    def _multiplied(self, node: State, V: Tensor) -> Tensor:
        """A^-1 V for columns V."""
        if "inverse" in node:
            return unpack(node["inverse"])._matmul(V)
        return self._solve(node, V.reshape(*node["factor"].shape[:-1], V.shape[1])).reshape(V.shape)

    def _along(self, node: State, X: Tensor, mode: int) -> Tensor:
        """A^-1 along one mode of X (b, n_1, ..., n_k, c)."""
        inverse = unpack(node["inverse"]) if "inverse" in node else None
        if not isinstance(inverse, (Dense, Diagonal)):
            return mode_product(lambda V: self._multiplied(node, V), X, mode)
        stack = inverse.matrix.reshape(-1, inverse.size, inverse.size) if isinstance(inverse, Dense) else inverse.values.reshape(-1, inverse.size)
        return mode_products([stack if m == mode else None for m in range(1, X.dim() - 1)], X)

    def _check(self, pivots: Tensor, scale: Tensor, shape: torch.Size) -> None:
        """Fail where a pivot is within rounding of zero against `scale`, which is to divide by noise, or is NaN."""
        if not bool((pivots > ROUNDING * torch.finfo(pivots.dtype).eps * scale).all()):
            self._fail("a matrix", shape)

    def _fail(self, what: str, shape: torch.Size) -> None:
        state = "not positive definite" if self.needs_definite else "singular"
        raise SolverFailure(
            f"the {self.name} solver found {what} of shape {tuple(shape)} {state} to working precision: "
            "increase the damping, which must be positive."
        )
