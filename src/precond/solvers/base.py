"""The contract of a solver, and the registry of solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from precond.damping import Blockwise, Damping, Tikhonov
from precond.errors import InvalidCombination
from precond.operators import BlockDiagonal, FitName, Operator, Repeated, RootShifted, Shifted, SparsePrecision
from precond.operators.block_diagonal import put, take
from precond.operators.repeated import alongside
from precond.registry import Registry

State = dict[str, Any]
"""All that `apply` needs: tensors, numbers, strings and nested dicts of them; nothing of a network."""


class Solver(ABC):
    """Prepares and applies the inverse power of a damped operator.

    `refresh` puts all that `apply` needs into the state; only a matrix-free operator is handed to `apply`. Laws, to rounding, of
    `apply` as a map of vectors: it is linear, symmetric, positive where the damped operator is, and equal to the dense inverse power
    of `damped(operator, damping)`.

    A new solver writes `accepts`, `_refresh` and `_apply`, and is registered by `@REGISTRY.register(name)`.
    """

    name: ClassVar[str]
    accepts: ClassVar[frozenset[type[Operator]]]
    """The structures it takes, before damping; `Operator` stands for every one that has a product."""
    needs_definite: ClassVar[bool] = False
    """Whether the damped operator must be positive definite."""
    live: ClassVar[bool] = False
    """Whether it takes matrix-free operators, which are then handed to `apply`."""
    follows: ClassVar[tuple[str, ...]] = ()
    """Kinds of observation that it follows, which it is given where the matrix has them, before any operator."""
    averages: ClassVar[bool] = False
    """Whether it averages in its own state, so that a history of what it is given would average twice."""
    fits: ClassVar[frozenset[FitName]] = frozenset()
    """The structures that it fits to `Pairs`."""
    half: ClassVar[bool] = False
    """Whether it takes operators in float16 and bfloat16: what is factorised or iterated on is to be cast to float32 before."""
    power: float = 1.0
    """p: what is applied is damped^(-p). An option of the solvers that have powers."""

    def natural_damping(self, structure: type[Operator]) -> type[Damping]:
        """What a number given as damping means for a structure: exact C + damping I wherever the solver can add it."""
        return Blockwise if issubclass(structure, SparsePrecision) else Tikhonov

    def takes(self, operator: Operator | type[Operator]) -> bool:
        """Whether it can invert a structure; the user's own shift counts as part of what it shifts, and blocks are inverted one by one."""
        if isinstance(operator, BlockDiagonal):
            return all(self.takes(block) for block in operator.blocks.values())
        if isinstance(operator, (Shifted, RootShifted, Repeated)):
            return self.takes(operator.operator)
        structure = operator if isinstance(operator, type) else type(operator)
        return any(issubclass(structure, accepted) for accepted in self.accepts)

    def remark(self) -> str | None:
        """In which structure it holds what it applies, for `describe()`, where that is not the operator's own."""
        return None

    def damped(self, operator: Operator, damping: Damping) -> Operator:
        """The operator that is inverted."""
        return damping(operator, self.power)

    def init(self, operator: Operator, damping: Damping) -> State:
        """The first state."""
        return self.refresh({}, operator, damping)

    def refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        """A new state for a new operator; the old one is left as it is.

        Raises:
            InvalidCombination: it cannot take this structure, or this damping of it.
            SolverFailure: the damped operator is singular, indefinite or not finite.
        """
        if not self.takes(operator):
            self.refuse(operator, f"it takes {', '.join(sorted(s.__name__ for s in self.accepts))}")
        if operator.dtype in (torch.float16, torch.bfloat16) and not self.half:
            self.refuse(operator, f"it is in {operator.dtype}, too coarse to invert; cast it with operator.to(torch.float32)")
        if isinstance(operator, BlockDiagonal):
            old = state.get("blocks", {})
            blocks = {name: self.refresh(old.get(name, {}), block, damping) for name, block in operator.blocks.items()}
            return {"blocks": blocks, "layout": dict(operator.layout)}
        if isinstance(operator, Repeated):
            return {"count": operator.count, "each": self.refresh(state.get("each", {}), operator.operator, damping)}
        return self._refresh(state, operator, damping)

    def apply(self, state: State, vector: Tensor, operator: Operator | None = None) -> tuple[Tensor, State]:
        """damped^(-power) times `vector` (n,) or (n, k), and the new state.

        Args:
            operator: the live operator of this step, the same that `refresh` was given, before damping; needed where it is matrix-free.
        """
        if vector.dim() not in (1, 2):
            raise ValueError(f"the {self.name} solver takes a vector (n,) or columns (n, k), not shape {tuple(vector.shape)}.")
        columns = vector.unsqueeze(1) if vector.dim() == 1 else vector
        if "layout" in state:
            result, state = self._apply_blocks(state, columns, operator)
        else:
            result, state = (self._apply_each if "each" in state else self._apply)(state, columns, operator)
        return result.reshape(vector.shape), state

    def _apply_each(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        """The equal blocks of a `Repeated`, as columns of one."""
        each: State = state["each"]
        live = operator.operator if isinstance(operator, Repeated) else None

        def inner(columns: Tensor) -> Tensor:
            nonlocal each
            result, each = self.apply(each, columns, live)
            return result

        return alongside(inner, V, state["count"]), state | {"each": each}

    def _apply_blocks(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        live = operator.blocks if isinstance(operator, BlockDiagonal) else {}
        parts, states = take(V, state["layout"]), {}
        for name, inner in state["blocks"].items():
            parts[name], states[name] = self.apply(inner, parts[name], live.get(name))
        return put(parts, state["layout"], V), state | {"blocks": states}

    @abstractmethod
    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        """`refresh`, for an operator that it takes."""

    @abstractmethod
    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        """`apply`, to columns (n, k)."""

    def refuse(self, operator: Operator, advice: str) -> NoReturn:
        """Raise `InvalidCombination` for a structure."""
        inner = operator.operator.kind if isinstance(operator, (Shifted, RootShifted)) else ""
        described = f"{operator.kind}({inner})" if inner else operator.kind
        raise InvalidCombination(f"the {self.name} solver cannot invert a {described} operator of shape {tuple(operator.shape)}: {advice}.")


REGISTRY: Registry[Solver] = Registry("solvers", Solver)  # type: ignore[type-abstract]  # its members are concrete
