"""Which forward pass a criterion's input came from: walk the graph back to a node that carries a record."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from precond.errors import ObservationError
from precond.observe.records import Forward

_WALK_LIMIT = 10_000


def find_forward(output: Tensor, key: str) -> tuple[Forward, dict[int, Any], int] | None:
    """The record that made `output`, the model-output nodes met on the way by number, and the first number.

    None where the tensor came from no recorded pass (another model, an evaluation).
    """
    found: dict[int, Any] = {}
    forward: Forward | None = None
    seen: set[Any] = {output.grad_fn}
    queue = deque([output.grad_fn])
    while queue and len(seen) < _WALK_LIMIT:
        node = queue.popleft()
        if node is None:
            continue
        carried: dict[str, Any] = node.metadata  # type: ignore[assignment]  # torch declares it a method
        entry = carried.get(key)
        if entry is not None:
            if forward is not None and entry[0] is not forward:
                raise ObservationError(
                    "the criterion's input was made from several forward passes of the model, so its examples cannot be told apart: "
                    "call the criterion on the output of each pass and add the losses."
                )
            forward, number = entry
            found[number] = node
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return None if forward is None else (forward, found, min(found))


def refuse_reentrant_checkpoint(output: Tensor) -> None:
    """Raise when a layer ran inside `checkpoint(use_reentrant=True)`, whose graph does not exist until its backward."""
    seen: set[Any] = {output.grad_fn}
    queue = deque([output.grad_fn])
    while queue:
        node = queue.popleft()
        if node is None:
            continue
        if "CheckpointFunctionBackward" in type(node).__name__ + node.name():
            raise ObservationError(
                "the model uses reentrant activation checkpointing, which hides the graph of the layers inside it: "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
