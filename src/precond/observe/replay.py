"""Replay: the recorded forward pass again, at the present parameters, and live products made from it.

`loss.backward()` frees the graph, but a solve needs the final right-hand side, which exists at the step. So the
forward pass is run again on the unwrapped module with the same arguments, randomness, autocast state and buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from precond.errors import ObservationError
from precond.observe.guard import own_pass
from precond.observe.names import canonical
from precond.observe.observation import Tensors
from precond.observe.passes import batched_grad
from precond.observe.records import CriterionCall, Forward
from precond.observe.trees import tensors_in, versions
from precond.observe.twice import TwiceDifferentiable


class OutputCurvature(Protocol):
    """v -> S S^T v in output space, for the terms of one criterion call (no scale)."""

    def __call__(self, output: Tensor, vector: Tensor) -> Tensor: ...


def save_rng(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a forward pass on `device` may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


@contextlib.contextmanager
def drawing_again(states: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
    """The generators as they were when something was drawn; they are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        yield


@contextlib.contextmanager
def same_conditions(forward: Forward, device: torch.device) -> Iterator[None]:
    """Randomness and autocast as they were when the pass was recorded."""
    kind, enabled, dtype = forward.autocast
    with (
        own_pass(), torch.enable_grad(), drawing_again(forward.rng, device),
        torch.autocast(kind, enabled=enabled, dtype=dtype), sdpa_kernel(SDPBackend.MATH),
    ):  # fused attention has no second derivative; the math kernel has
        yield


def replay(call: CriterionCall, model: nn.Module, at: Mapping[str, Tensor] | None = None, graph: bool = True) -> Tensor:
    """The criterion's input again, with a fresh graph (or none), at the present parameters, or with those of `at` in their place."""
    forward = call.forward
    if versions((forward.args, dict(forward.kwargs))) != forward.versions:
        raise ObservationError(
            "the batch was changed in place after the forward pass, so the pass cannot be run again: clone the batch, "
            "or use a representation that needs no products (any but 'matrix_free')."
        )
    assert call.bridge is not None, "products are demanded before the forward pass, which then keeps the bridge"
    # copies: a second pass must not move BatchNorm's running statistics, or the vectors of spectral_norm, a second time
    buffers = {n: forward.buffers.get(n, b).detach().clone() for n, b in model.named_buffers()}
    moved = {} if at is None else {n: at[canonical(n)] for n, _ in model.named_parameters(remove_duplicate=False) if canonical(n) in at}
    with same_conditions(forward, call.output.device), torch.set_grad_enabled(graph), TwiceDifferentiable():
        outputs = list(tensors_in(torch.func.functional_call(model, {**buffers, **moved}, forward.args, dict(forward.kwargs))))
        return call.bridge(outputs[call.model_output])


class Linearised:
    """C v for one criterion call from one replay: J^T (S S^T) J v, with J the Jacobian of the criterion's input."""

    def __init__(
        self, call: CriterionCall, model: nn.Module, params: Mapping[str, Tensor], curvature: OutputCurvature,
        at: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.params, self.curvature = params, curvature
        self.output = replay(call, model, at)
        self._cotangent = torch.zeros_like(self.output, requires_grad=True)
        with own_pass(), torch.enable_grad():
            # J^T u as a function of u: differentiating it once more along v gives J v without forward mode
            found = torch.autograd.grad(
                self.output, list(params.values()), self._cotangent, create_graph=True, allow_unused=True, retain_graph=True
            )
        self._transposed = dict(zip(params, found, strict=True))

    def __call__(self, vectors: Tensors) -> Tensors:
        names = [n for n in vectors if self._transposed[n] is not None]
        if not names:
            return {n: torch.zeros_like(v) for n, v in vectors.items()}
        transposed = [self._transposed[n] for n in names]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            (pushed,) = batched_grad([t for t in transposed if t is not None], [self._cotangent], [vectors[n] for n in names])
            if pushed is None:
                return {n: torch.zeros_like(v) for n, v in vectors.items()}
            back = torch.stack([self.curvature(self.output.detach(), p) for p in pushed.detach()])
            found = batched_grad([self.output], [self.params[n] for n in vectors], [back.to(self.output.dtype)])
        return {n: torch.zeros_like(v) if g is None else g.detach() for (n, v), g in zip(vectors.items(), found, strict=True)}


    def pull(self, cotangent: Tensor) -> Tensors:
        """J^T s for one cotangent of the output."""
        with torch.enable_grad():
            found = batched_grad([self.output], list(self.params.values()), [cotangent.to(self.output.dtype).unsqueeze(0)])
        return {n: torch.zeros_like(p) if g is None else g[0].detach() for (n, p), g in zip(self.params.items(), found, strict=True)}


class SecondOrder:
    """H v for the loss of one criterion call, by differentiating its gradient again."""

    def __init__(self, call: CriterionCall, model: nn.Module, params: Mapping[str, Tensor], at: Mapping[str, Tensor] | None = None) -> None:
        if call.criterion is None:
            raise ObservationError(
                "the Hessian differentiates the criterion itself, which `observe(loss, output, target)` does not give: attach a criterion "
                "module, or use the matrix 'ggn'."
            )
        self.params = params
        output = replay(call, model, at)
        with own_pass(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = call.likelihood.loss(call.criterion, output, call.target)
            found = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
        self._gradient = dict(zip(params, found, strict=True))

    def __call__(self, vectors: Tensors) -> Tensors:
        names = [n for n in vectors if self._gradient[n] is not None and self._gradient[n].requires_grad]
        if not names:
            return {n: torch.zeros_like(v) for n, v in vectors.items()}
        gradient: Sequence[Tensor] = [g for n in names if (g := self._gradient[n]) is not None]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            found = batched_grad(gradient, [self.params[n] for n in vectors], [vectors[n] for n in names])
        return {n: torch.zeros_like(v) if g is None else g.detach() for (n, v), g in zip(vectors.items(), found, strict=True)}
