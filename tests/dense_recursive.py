"""The dense oracle of the batch-averaged recursion (KFRA), by loops over examples, modules and positions, and explicit Jacobians.

Claims (F.14 of the methods), for `nn.Sequential`, nested or not, and a single layer:

* G at the output of the last Linear or convolution is sum over examples of T_i^T H_ii T_i, H the exact Hessian of the criterion in the
  whole batch's output, T_i the Jacobian of what follows that layer;
* downwards, a linear module with Jacobian J gives J^T G J, an element-wise one G o mean over examples of phi' phi'^T;
* B sums G over pairs of equal positions, or with `reduce` over all pairs of positions, each group of a convolution on its own;
* the matrix is B (x) A in the order of vec[W, b] of each layer whose weight is trained, A that of `dense_kron`; nothing between layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import dense
import dense_derived
import dense_kron
from dense_terms import Criterion

_LINEAR = (nn.Linear, _ConvNd, nn.Flatten, nn.Identity, nn.Dropout, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def modules(model: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The chain, in order; a module that is there twice is there twice."""
    if not isinstance(model, nn.Sequential):
        return [(name, model)]
    return [each for child, inner in model._modules.items() for each in modules(inner, f"{name}.{child}" if name else child)]


def _jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """(outputs, inputs) of one example."""
    y = module(x.clone().unsqueeze(0))
    return torch.func.jacrev(lambda flat: module(flat.clone().reshape(1, *x.shape)).flatten())(x.flatten()).reshape(y.numel(), x.numel())


def _signals(chain: list[tuple[str, nn.Module]], inputs: Tensor) -> list[list[Tensor]]:
    """What each example is at the input of each module, and at the end."""
    signals = [[x.detach().clone() for x in inputs]]
    for _, module in chain:
        signals.append([module(x.clone().unsqueeze(0)).detach().squeeze(0) for x in signals[-1]])
    return signals


def moments(model: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """{layer: G at its output} for every Linear and convolution."""
    chain = modules(model)
    signals = _signals(chain, inputs)
    output = torch.stack(signals[-1])
    hessian = torch.func.hessian(lambda flat: criterion(flat.reshape(output.shape), targets))(output.flatten())
    per, last = output[0].numel(), max(k for k, (_, module) in enumerate(chain) if isinstance(module, nn.Linear | _ConvNd))
    G = 0
    for i in range(len(inputs)):
        H = hessian[i * per : (i + 1) * per, i * per : (i + 1) * per]
        for k in range(len(chain) - 1, last, -1):
            J = _jacobian(chain[k][1], signals[k][i])
            H = J.T @ H @ J
        G = G + H
    found = {}
    for k in range(last, -1, -1):
        name, module = chain[k]
        if isinstance(module, nn.Linear | _ConvNd):
            found[name] = G
        if isinstance(module, _LINEAR):
            J = _jacobian(module, signals[k][0])
            G = J.T @ G @ J
        else:
            slopes = [_jacobian(module, x).diagonal() for x in signals[k]]
            G = G * sum(torch.outer(s, s) for s in slopes) / len(slopes)
    return found


def factors(module: nn.Module, G: Tensor, reduce: bool) -> list[Tensor]:
    """B of each group."""
    if isinstance(module, nn.Linear):
        places = torch.arange(G.shape[0]).reshape(-1, module.out_features)  # (positions, channels)
        groups = 1
    else:
        places = torch.arange(G.shape[0]).reshape(module.out_channels, -1).T
        groups = module.groups
    out = places.shape[1] // groups
    made = []
    for g in range(groups):
        B = torch.zeros(out, out, dtype=torch.float64)
        for r, first in enumerate(places):
            for s, second in enumerate(places):
                if r == s or reduce:
                    B += G[first[g * out : (g + 1) * out]][:, second[g * out : (g + 1) * out]]
        made.append(B)
    return made


def ggn_recursive(model: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor, *, reduce: bool = False) -> Tensor:
    """(P, P), in parameter order."""
    P = sum(p.numel() for p in dense.parameters(model))
    result = torch.zeros(P, P, dtype=torch.float64)
    for name, G in moments(model, criterion, inputs, targets).items():
        module = model.get_submodule(name)
        if not module.weight.requires_grad:
            continue
        A = [dense_kron._mean_outer(a.mean(1) if reduce else a.flatten(0, 1)) for a in dense_derived.input_rows(model, inputs, name)]
        block = torch.block_diag(*(torch.kron(b, a.contiguous()) for b, a in zip(factors(module, G, reduce), A, strict=True)))
        where = dense.joint_indices(model, name)
        result[where.unsqueeze(1), where] = block
    return result
