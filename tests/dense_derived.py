"""The dense oracle for matrices derived from others: |H|, the covariance of gradients, a gradient at drawn labels, moments of inputs.

Claims:

* `absolute` is the matrix function of a symmetric matrix: taken of a projection, it is taken of each of its blocks;
* `gradient_covariance` is scale * sum over examples of (g_i - gbar)(g_i - gbar)^T, gbar the plain mean over examples;
* `batched_fisher_mc` is g g^T / scale with g = scale * sum of J_i^T s_i: with equal weights c of N_terms terms, sum c / sum c^2 = 1 / c;
* `batched_by_terms` is g g^T / scale with g the gradient of the loss: N_terms g g^T for a mean, g g^T for a sum;
* `input_second_moment` has I (x) A in the order of vec[W, b] at each Linear and Conv2d, A the mean over all rows of all calls of a a^T, of its
  own group for each output of a grouped convolution; counts (x) I at an Embedding; zero at all others, at a bias whose weight is frozen,
  and at a weight tied between layers of different kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
import dense_kron
from dense_terms import Criterion


def absolute(M: Tensor) -> Tensor:
    """|M| of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((M + M.T) / 2)
    return vectors @ values.abs().diag() @ vectors.T


def abs_hessian(model: nn.Module, criterion: Criterion, inputs: dense.Inputs, targets: Tensor) -> Tensor:
    return absolute(dense.hessian(model, criterion, inputs, targets))


def centred(rows: Tensor, factor: float) -> Tensor:
    """factor * sum over rows (n, P) of the outer products of their deviations from the mean."""
    mean = sum(rows) / len(rows)
    return factor * sum(torch.outer(row - mean, row - mean) for row in rows)


def gradient_covariance(model: nn.Module, criterion: Criterion, inputs: dense.Inputs, targets: Tensor) -> Tensor:
    rows = dense.per_example_gradients(model, criterion, inputs, targets)
    return centred(rows, dense.scale(criterion, dense.predict(model, inputs), targets))


def batched_fisher_mc(model: nn.Module, criterion: Criterion, inputs: dense.Inputs, targets: Tensor, cotangents: Tensor) -> Tensor:
    """For the given cotangents (1, *output.shape)."""
    total = dense.column_gradients(model, criterion, inputs, cotangents)[0].sum(0)
    return dense.scale(criterion, dense.predict(model, inputs), targets) * torch.outer(total, total)


def batched_by_terms(model: nn.Module, criterion: Criterion, inputs: dense.Inputs, targets: Tensor) -> Tensor:
    return dense.batched_empirical_fisher(model, criterion, inputs, targets) / dense.scale(criterion, dense.predict(model, inputs), targets)


def has_inputs(model: nn.Module, layer: str, names: list[str]) -> bool:
    """Whether a layer's parameters `names` have a moment of inputs."""
    module, weight = model.get_submodule(layer), f"{layer}.weight" if layer else "weight"
    if not (isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding) or hasattr(module, "nf")) or weight not in names:
        return False
    users = [other for other in model.modules() if getattr(other, "weight", None) is module.weight]
    return all(type(other) is type(module) for other in users)


def input_rows(model: nn.Module, inputs: dense.Inputs, layer: str) -> list[Tensor]:
    """(N, rows of an example and of all calls, in'), one a group; of an Embedding the tokens (all of them,)."""
    module, seen, batch = model.get_submodule(layer), [], dense.batch_size(inputs)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    dense.predict(model, inputs)
    handle.remove()
    if isinstance(module, nn.Embedding):
        return [torch.cat([x.flatten() for x in seen])]
    return [torch.cat(calls, 1) for calls in zip(*(dense_kron._input_rows(module, x, batch) for x in seen), strict=True)]


def input_second_moment(
    model: nn.Module, criterion: Criterion | None, inputs: dense.Inputs, targets: Tensor | None = None, *, reduce: bool = False
) -> Tensor:
    """reduce: rows are averaged over an example's positions first."""
    places = dense.positions(model)
    result = torch.zeros(sum(p.numel() for p in dense.parameters(model)), dtype=torch.float64).diag()
    for layer, names in dense.layer_groups(model):
        if not has_inputs(model, layer, names):
            continue
        module, rows = model.get_submodule(layer), input_rows(model, inputs, layer)
        if isinstance(module, nn.Embedding):
            if reduce:
                continue
            kept = [int(token) for token in rows[0] if int(token) != (-1 if module.padding_idx is None else module.padding_idx)]
            share = torch.tensor([kept.count(token) / len(kept) for token in range(module.num_embeddings)], dtype=torch.float64)
            (name,) = names
            where, block = torch.arange(places[name].start, places[name].stop), torch.kron(share.diag(), _eye(module.embedding_dim))
        else:
            A = [dense_kron._mean_outer(a.mean(1) if reduce else a.flatten(0, 1)) for a in rows]
            outputs = getattr(module, "nf", module.weight.shape[0])
            where = dense.joint_indices(model, layer)
            block = torch.block_diag(*(A[o // (outputs // len(A))] for o in range(outputs)))
        result[where.unsqueeze(1), where] = block
    return result


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)
