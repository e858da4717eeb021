"""The whole matrix, on a pattern."""

from __future__ import annotations

from dataclasses import dataclass

from precond.representations.base import REGISTRY
from precond.representations.sparse import SparseForm


@REGISTRY.register("full_sparse")
@dataclass(frozen=True, kw_only=True)
class FullSparse(SparseForm):
    """Entries of C over all parameters, in parameter order: on a pattern, or as FANG's sparse inverse. Never (P, P) dense.

    form, pattern, width: see `SparseForm`. Memory P + m numbers for m pairs. Source: Grosse & Salakhutdinov, "Scaling up natural gradient
    by sparsely factorizing the inverse Fisher matrix" (FANG), 2015.

    >>> import torch, precond
    >>> model = torch.nn.Linear(2, 1)
    >>> x, y = torch.eye(2), torch.zeros(2, 1)
    >>> C = precond.curvature(model, torch.nn.MSELoss(), x, y, matrix="ggn", repr=FullSparse(form="masked", pattern="band"))
    >>> C.to_dense().round()  # the pair of a weight and the bias is not in the band
    tensor([[1., 0., 0.],
            [0., 1., 1.],
            [0., 1., 2.]])
    """

    scope = "model"
