"""SKFAC (Tang et al. 2021): K-FAC of this batch alone, every block a dense kron(B_d, A_d) and a dense solve.

A, B of the batch's rows (of their means and sums over positions: "reduce"), nothing averaged over steps; pi-damped; KL clip and momentum
as in `kfac`. The network "wide" has fewer rows than inputs and outputs, where the rows themselves are kept, "mlp" more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense
import dense_kron
from references.common import Batch, Drawn, Network, descend
from references.kfac import _damped, _layers

NETS = ("wide", "mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "empirical": ({"matrix": "empirical_fisher"}, {"empirical": True}),
    "reduce": ({"repr": {"sharing": "reduce"}}, {"reduce": True}),
    "damping": ({"damping": 1e-3}, {"damping": 1e-3}),
    "interval_3": ({"curvature_interval": 3}, {"interval": 3}),
    "no_clip": ({"transforms": [], "damping": 1.0}, {"bound": None, "damping": 1.0}),
}
ONLY = {"reduce": ("conv",), "empirical": ("wide", "conv"), "damping": ("wide",), "interval_3": ("mlp",), "no_clip": ("wide",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"interval": 2}, {"bound": 2e-3}, {"damping": 0.2}, {"empirical": True}, {"per_column": 2.0})


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, interval: int = 1, damping: float = 0.1, bound: float | None = 1e-3,
    empirical: bool = False, reduce: bool = False, per_column: float = 1.0, lr: float = 0.1,
) -> Tensor:  # fmt: skip
    """per_column: what B is divided by beyond N."""
    inverted: dict[str, Tensor] = {}
    seen = iter(drawn.labels)

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        inputs, targets = batch
        if step % interval == 0:
            output = dense.predict(model, inputs)
            labels = targets if empirical else next(seen)
            cotangents = (output.softmax(1) - F.one_hot(labels, output.shape[1])).unsqueeze(0)
            for name in _layers(model):
                factors = dense_kron.kron_reduce if reduce else dense_kron.kron_expand
                B, A = factors(model, network.criterion, inputs, targets, cotangents, name)
                inverted[name] = _damped(B / per_column, A, damping)
        result = torch.zeros_like(gradient)
        for name, matrix in inverted.items():
            where = dense.joint_indices(model, name)
            result[where] = torch.linalg.solve(matrix, gradient[where])
        return result if bound is None else result * min(1.0, (bound / (lr**2 * float(result @ gradient))) ** 0.5)

    return descend(network, batches, direction, lr=lr, momentum=0.9)
