"""The dense oracle for sparse patterns, by loops: masks, parents, and the network that a graph makes of a matrix.

Claims:

* `network` is C with C^-1 = (I - B)^T D^-1 (I - B), row i of B the regression of coordinate i on its parents under F, D what is left;
  a parent that is constant, or was before rounding (a bias that softmax or BatchNorm cancels), tells nothing and is left out;
* `parents` are those of the presets in the order of theta: "bias": the bias of the unit of a weight, as `dense.unit_indices` has units,
  "unit": the coordinates of its unit before it, "band": the `width` coordinates before it, "diagonal": none;
* `mask` keeps the pairs of a coordinate and its parents, and the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense

Parents = list[list[int]]


def parents(model: nn.Module, pattern: str, width: int = 1) -> Parents:
    P = sum(p.numel() for p in dense.parameters(model))
    found: Parents = [[] for _ in range(P)]
    if pattern == "band":
        return [list(range(max(0, i - width), i)) for i in range(P)]
    places = dense.positions(model).values()
    for unit in dense.unit_indices(model) if pattern != "diagonal" else ():
        one, last = unit.tolist(), int(unit[-1])
        tensors = {next(n for n, place in enumerate(places) if place.start <= i < place.stop) for i in one}
        for at, i in enumerate(one):
            if pattern == "unit":
                found[i] = one[:at]
            elif len(tensors) == 2 and i != last:
                found[i] = [last]
    return found


def mask(graph: Parents) -> Tensor:
    """(P, P) of booleans."""
    kept = torch.eye(len(graph), dtype=torch.bool)
    for i, above in enumerate(graph):
        for j in above:
            kept[i, j] = kept[j, i] = True
    return kept


def network(F: Tensor, graph: Parents) -> Tensor:
    """C of a graph; of F itself, so that damping is added before."""
    n = len(F)
    IB, D = torch.eye(n, dtype=F.dtype), torch.zeros(n, dtype=F.dtype)
    for i, every in enumerate(graph):
        D[i] = F[i, i]
        pa = [j for j in every if F[j, j] > 1e-20 * F.diagonal().max()]
        if pa:
            B = torch.linalg.pinv(F[pa][:, pa], hermitian=True) @ F[pa, i]
            IB[i, pa] = -B
            D[i] -= B @ F[pa, i]
    inner = torch.linalg.inv(IB)
    return inner @ D.diag() @ inner.T
