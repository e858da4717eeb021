"""The dense oracle: gradients and curvature matrices of a small network, by autograd and plain loops. Nothing of `precond` is used.

Claims and conventions:

* theta is `cat([p.flatten() for p in model.parameters() if p.requires_grad])`, P numbers, and every matrix is (P, P) in that order;
* a matrix is that of the loss as given: `scale * sum over terms`, `scale` = 1 / N_terms for 'mean' and 1 for 'sum' (see `dense_terms`);
* `hessian` and `ggn` need no knowledge of terms: they differentiate `criterion(model(inputs), targets)` and hold for any criterion;
* `fisher` enumerates the labels of the model, term by term. Over the joint labels of several terms the cross products vanish, because
  the labels are independent given the output and a term's gradient has mean zero; so the sum over terms is exact;
* gradients of one example back-propagate the sum of its term losses through the WHOLE batch. Where examples mix (BatchNorm in training
  mode) this is the derivative of example i's loss with the batch's statistics, not that of example i on its own;
* pure: buffers of the model are put back, `.grad` is untouched. The math kernel of attention is used, as the fused ones cannot be
  differentiated twice.

Projections of a matrix on blocks are in `dense_blocks`, Kronecker factors in `dense_kron`; terms and cotangents in `dense_terms`.
Everything of `dense_blocks` and `dense_terms` that tests need can be had from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dense_blocks import joint_indices, layer_groups, positions, project_diagonal, project_layer, project_tensor, project_unit, unit_indices
from dense_terms import (
    Criterion,
    curvature_weights,
    exact_cotangents,
    factor_columns,
    model_labels,
    rows,
    scale,
    term_losses,
    terms,
    unrows,
)
from dense_twice import written_out

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

__all__ = [
    "batch_size",
    "batched_empirical_fisher",
    "column_gradients",
    "curvature_weights",
    "empirical_fisher",
    "exact_cotangents",
    "factor_columns",
    "fisher",
    "fisher_mc",
    "forward",
    "ggn",
    "gradient",
    "hessian",
    "jacobian",
    "joint_indices",
    "layer_groups",
    "parameters",
    "per_example_gradients",
    "positions",
    "predict",
    "project_diagonal",
    "project_layer",
    "project_tensor",
    "project_unit",
    "scale",
    "split",
    "term_losses",
    "terms",
    "unit_indices",
]


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in the order of theta."""
    return [p for p in model.parameters() if p.requires_grad]


def batch_size(inputs: Inputs) -> int:
    """The number of examples: the leading dimension of the model's (first) input."""
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
    return first.shape[0]


@contextmanager
def forward(model: nn.Module, inputs: Inputs) -> Iterator[Tensor]:
    """The output with its graph; the model's buffers are put back at the end, when the graph has been used."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            if isinstance(inputs, dict):
                yield model(**inputs)
            else:
                yield model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)


def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """The output without its graph."""
    with forward(model, inputs) as output:
        return output.detach()


def _flat(of: Tensor, model: nn.Module, cotangent: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    """The vector-Jacobian product of `of` with theta, (P,); zero where `of` does not depend on a parameter. Keeps the graph."""
    grads = torch.autograd.grad(
        of, parameters(model), cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([grad.flatten() for grad in grads])


def gradient(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor) -> Tensor:
    """The gradient of the loss as given, (P,)."""
    with forward(model, inputs) as output:
        return _flat(criterion(output, targets), model)


def per_example_gradients(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor) -> Tensor:
    """(N, P): row i is the gradient of the sum of example i's term losses, unscaled, through the whole batch (see the head of the file)."""
    with forward(model, inputs) as output:
        sums = term_losses(criterion, output, targets).reshape(batch_size(inputs), -1).sum(1)
        return torch.stack([_flat(loss, model) for loss in sums])


def hessian(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor) -> Tensor:
    """The Hessian of the loss in theta, one row at a time by double backward. Not symmetrised.

    torch has no second derivative of `embedding_bag` and a wrong one of `_weight_norm`: both are written out, see `dense_twice`.
    """
    with written_out(), forward(model, inputs) as output:
        first = _flat(criterion(output, targets), model, create_graph=True)
        return torch.stack([_flat(entry, model) for entry in first])


def jacobian(model: nn.Module, inputs: Inputs) -> Tensor:
    """(outputs, P): the Jacobian of the flattened whole-batch output, one backward pass a row."""
    with forward(model, inputs) as output:
        return torch.stack([_flat(entry, model) for entry in output.flatten()])


def ggn(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor) -> Tensor:
    """J^T H J with H the exact Hessian of the criterion in the flattened output, by `torch.func.hessian`; right for any layout."""
    output = predict(model, inputs)
    curvature = torch.func.hessian(lambda flat: criterion(flat.reshape(output.shape), targets))(output.flatten())
    J = jacobian(model, inputs)
    return J.T @ curvature @ J


def fisher(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor) -> Tensor:
    """scale * sum over terms of E[g g^T], the expectation over the model's labels by enumeration; scaled so that it equals the GGN.

    A weighted term keeps its weight m once (m E[g g^T]); a BCE term that is a mean over K units is 1/K times the Fisher of the K units.
    """
    P = sum(p.numel() for p in parameters(model))
    total = torch.zeros(P, P, dtype=torch.float64)
    with forward(model, inputs) as output:
        weights = curvature_weights(criterion, output.detach(), targets)
        for row, weight in zip(rows(criterion, output), weights, strict=True):
            for probability, loss in model_labels(criterion, row, weight):
                g = _flat(loss, model)
                total += probability * torch.outer(g, g)
        return scale(criterion, output, targets) * total


def column_gradients(model: nn.Module, criterion: Criterion, inputs: Inputs, cotangents: Tensor) -> Tensor:
    """(K, N, P): J_i^T s_ik, one backward pass each with all outputs of the other examples set to zero.

    `cotangents` is (K, *output.shape), per term and unscaled: a derivative of the term's loss, before any division by N_terms.
    """
    batch = batch_size(inputs)
    with forward(model, inputs) as output:
        count = rows(criterion, output).shape[0]
        owner = torch.arange(count) // (count // batch)
        columns = []
        for cotangent in cotangents:
            flat = rows(criterion, cotangent)
            masked = (flat * (owner == example).unsqueeze(1) for example in range(batch))
            columns.append(torch.stack([_flat(output, model, unrows(criterion, each, output.shape)) for each in masked]))
        return torch.stack(columns)


def fisher_mc(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor, cotangents: Tensor) -> Tensor:
    """scale * sum_ik (J_i^T s_ik)(J_i^T s_ik)^T for given cotangents (K, *output.shape); a mean over samples is in the cotangents."""
    U = column_gradients(model, criterion, inputs, cotangents).flatten(0, 1)
    return scale(criterion, predict(model, inputs), targets) * U.T @ U


def empirical_fisher(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor) -> Tensor:
    """scale * sum_i g_i g_i^T with g_i the gradient of example i's summed terms."""
    U = per_example_gradients(model, criterion, inputs, targets)
    return scale(criterion, predict(model, inputs), targets) * U.T @ U


def batched_empirical_fisher(model: nn.Module, criterion: Criterion, inputs: Inputs, targets: Tensor) -> Tensor:
    """g g^T of the gradient of the loss as given."""
    g = gradient(model, criterion, inputs, targets)
    return torch.outer(g, g)


def split(vectors: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """(*, P) to {parameter name: (*, *parameter.shape)}."""
    shapes = dict(model.named_parameters())
    return {name: vectors[..., place].reshape((*vectors.shape[:-1], *shapes[name].shape)) for name, place in positions(model).items()}
