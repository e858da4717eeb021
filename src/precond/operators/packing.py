"""Operators as dicts of tensors, numbers and strings, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from precond.errors import UsageError
from precond.operators.base import Operator
from precond.operators.block_diagonal import BlockDiagonal
from precond.operators.matrix_free import MatrixFree


def pack(operator: Operator) -> dict[str, Any]:
    """An operator as nested dicts; the tensors are those of the operator, not copies.

    A matrix-free operator packs to a placeholder that `unpack` fills from a live one.

    >>> import torch; from precond.operators import Diagonal
    >>> pack(Diagonal(torch.ones(2)))
    {'kind': 'Diagonal', 'diagonal': tensor([1., 1.])}
    """
    return {"kind": operator.kind} | {name: _pack(value) for name, value in operator.fields().items()}


def unpack(packed: Mapping[str, Any], live: Operator | None = None) -> Operator:
    """The operator that was packed.

    Args:
        packed: from `pack`.
        live: an operator that holds the product of each matrix-free placeholder at the same place: the matrix-free operator itself, or
            one it is in.

    Raises:
        UsageError: there is a placeholder, and nothing live to fill it.
    """
    kind = packed["kind"]
    if kind == "MatrixFree":
        return _fill(packed["n"], live)
    own = {"kind", "blocks"} if kind == "BlockDiagonal" else {"kind"}
    fields = {name: _unpack(value, live) for name, value in packed.items() if name not in own}
    if kind == "BlockDiagonal":
        inside = live.blocks if isinstance(live, BlockDiagonal) else {}
        fields["blocks"] = {name: unpack(block, inside.get(name, live)) for name, block in packed["blocks"].items()}
    return Operator.kinds[kind].from_fields(fields)


def _pack(value: Any) -> Any:
    if isinstance(value, Operator):
        return pack(value)
    if isinstance(value, Mapping):
        return {name: _pack(inner) for name, inner in value.items()}
    return value


def _unpack(value: Any, live: Operator | None) -> Any:
    if not isinstance(value, Mapping):
        return value
    if isinstance(value.get("kind"), str):
        return unpack(value, live)
    return {name: _unpack(inner, live) for name, inner in value.items()}


def _fill(n: int, live: Operator | None) -> MatrixFree:
    while live is not None and not isinstance(live, MatrixFree):
        live = getattr(live, "operator", None)  # a live operator is only ever wrapped by Absolute, Repeated, Shifted and RootShifted
    if live is None:
        raise UsageError("this holds a matrix-free operator, whose product cannot be saved: hand the live operator of this step as well.")
    if live.n != n:
        raise UsageError(f"the live operator has {live.n} coordinates, the one that was packed {n}.")
    return live
