"""One call of one layer with random columns, and its gradients by example from `torch.func`, one example and one column at a time.

Claims:

* `call` gives the `LayerColumns` that an observer would have made; outputs that nothing came back to have no columns;
* `by_example` runs the module on one example alone, with its own parameters, and pulls one column back: no batch, no vmap, no rule;
* `whole` pulls all columns back through the whole batch at once and sums them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nets import normal
from precond.observe import LayerColumns, tensors_in

Tensors = dict[str, Tensor]


def call(
    module: nn.Module, *args: Any, batch: int | None = None, columns: int = 2, rows: str | None = None, reached: Sequence[int] = (0,),
    **kwargs: Any,
) -> LayerColumns:  # fmt: skip
    """Columns at the outputs `reached`; `batch` is the leading size of the first argument where it is not given."""
    with torch.no_grad():
        outputs = list(tensors_in(module(*args, **kwargs)))
    grads = tuple(normal(columns, *o.shape, seed=20 + i) if i in reached else None for i, o in enumerate(outputs))
    return LayerColumns("layer", module, args, kwargs, grads, module.training, args[0].shape[0] if batch is None else batch, rows)


def trainable(module: nn.Module) -> Tensors:
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}


def _pull(seen: LayerColumns, args: tuple[Any, ...], kwargs: dict[str, Any], cotangents: list[Tensor]) -> Tensors:
    def run(free: Tensors) -> tuple[Tensor, ...]:
        buffers = {n: b.clone() for n, b in seen.module.named_buffers()}  # made in here, as a transform lets nothing outside be written to
        outputs = list(tensors_in(torch.func.functional_call(seen.module, {**free, **buffers}, args, kwargs)))
        return tuple(o for o, g in zip(outputs, seen.grads, strict=True) if g is not None)

    with sdpa_kernel(SDPBackend.MATH):
        _, back = torch.func.vjp(run, trainable(seen.module))
        (found,) = back(tuple(cotangents))
    return dict(found)


def by_example(
    seen: LayerColumns, dim: int = 0, pick: Callable[[str, Any, int], Any] | None = None, dims: Sequence[int] | None = None
) -> Tensors:
    """{parameter: (K, N, *shape)}. `dim`: where the examples are, in the arguments and, unless `dims` says otherwise, in the outputs.

    pick(name, argument, i): the argument of example i, where an argument has its examples elsewhere or nowhere.
    """

    def one(name: str, argument: Any, i: int) -> Any:
        return argument.narrow(dim, i, 1) if pick is None else pick(name, argument, i)

    used = [g for g in seen.grads if g is not None]
    places = [dim] * len(used) if dims is None else dims
    table = []
    for k in range(used[0].shape[0]):
        row = []
        for i in range(seen.batch):
            args = tuple(one(str(n), a, i) for n, a in enumerate(seen.args))
            kwargs = {n: one(n, a, i) for n, a in seen.kwargs.items()}
            row.append(_pull(seen, args, kwargs, [g[k].narrow(d, i, 1) for g, d in zip(used, places, strict=True)]))
        table.append(row)
    return {n: torch.stack([torch.stack([one_[n] for one_ in row]) for row in table]) for n in table[0][0]}


def whole(seen: LayerColumns) -> Tensors:
    """{parameter: shape}: summed over columns and examples, in one pass."""
    return _pull(seen, seen.args, dict(seen.kwargs), [g.sum(0) for g in seen.grads if g is not None])
