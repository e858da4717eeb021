"""What one criterion call adds to a recursion over a chain: curvature at its end, and slopes on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.observe.chain import ChainSums, Link, chain_of
from precond.observe.guard import own_pass
from precond.observe.passes import nested_columns
from precond.observe.records import CriterionCall


def call_sums(model: nn.Module, part: CriterionCall, layers: frozenset[str], chunks: Iterable[Tensor]) -> ChainSums:
    """The sums of one criterion call, from its columns some at a time and one more forward pass through the chain."""
    chain = chain_of(model)
    inside = [i for i, link in enumerate(chain) if link.name in layers]
    chain = chain[inside[0] : inside[-1] + 1]
    batch, dtype = part.forward.batch, _dtype(chain[0].module)
    call = next(call for call in part.forward.calls if call.name == chain[0].name)
    x = call.columns([], batch).input.to(dtype)
    _check_layout(chain[0], x, batch, call.rows)
    output: Tensor | None = None
    for cotangents in chunks:
        for seen in nested_columns(part, cotangents, frozenset({chain[-1].name})):
            assert seen.grad is not None, "all links lie between the model's input and its output"
            g = seen.grad.to(dtype).flatten(0, 1)
            product = _outer(g)
            output = product if output is None else output + product
    assert output is not None
    links: list[Link] = []
    slopes: dict[str, Tensor] = {}
    for link in chain:
        links.append(replace(link, shape=tuple(x.shape[1:])))
        if link.elementwise:
            x, slope = _slope(links[-1], x)
            slopes[link.name] = _outer(slope)
        elif link is not chain[-1]:
            x = links[-1](x)
    return ChainSums(tuple(links), output, slopes)


def _slope(link: Link, x: Tensor) -> tuple[Tensor, Tensor]:
    """(phi(h), phi'(h)), each (N, *shape)."""
    with own_pass(), torch.enable_grad():
        h = x.detach().requires_grad_()
        y = link(h.clone())  # it may work in place
        (slope,) = torch.autograd.grad(y.sum(), h)
    return y.detach(), slope


def _outer(rows: Tensor) -> Tensor:
    """Sum over (n, *shape) of the outer products, (*shape, *shape)."""
    flat = rows.flatten(1)
    return (flat.T @ flat).reshape(*rows.shape[1:], *rows.shape[1:])


def _dtype(module: nn.Module) -> torch.dtype:
    return torch.promote_types(next(module.parameters()).dtype, torch.float32)


def _check_layout(link: Link, x: Tensor, batch: int, rows: str | None) -> None:
    spatial = 0 if isinstance(link.module, nn.Linear) else len(link.module.kernel_size)  # type: ignore[arg-type]
    if rows is not None or x.shape[0] != batch or x.dim() < 2 + spatial:
        raise ObservationError(
            f"layer {link.name!r} was given {tuple(x.shape)} for a batch of {batch} examples, and a curvature that is averaged over examples "
            "needs them in the leading dimension: bring the input of the model into that form, or use the matrix 'ggn'."
        )
