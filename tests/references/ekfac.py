"""EK-FAC (George et al. 2018) by dense blocks: (U diag(S) U^T + damping I) d = g, solved as it stands.

A, B of K-FAC expand and F, the exact empirical Fisher of a layer, are averaged as s <- beta s + (1 - beta) x, divided by 1 - beta^t (beta
is 0 in the released code: this batch alone); U = U_B (x) U_A of every T-th step; S = diag(U^T F U) of every step. When U changes, the
average of S goes on from the diagonal of the old matrix in the new basis. Then SGD with momentum 0.9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
import dense_eigen
import dense_kron
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
VARIANTS = {
    "default": ({}, {}),
    "interval_3": ({"repr": {"basis_interval": 3}}, {"interval": 3}),
    "average_interval_2": ({"repr": {"basis_interval": 2}, "history": {"name": "Ema", "beta": 0.9}}, {"interval": 2, "beta": 0.9}),
}
# the head's factor A of the convolutional network has a null space of four dimensions, whose basis is not unique: it shows once it is old
ONLY = {"interval_3": ("mlp",), "average_interval_2": ("mlp",)}
STEPS = 12
TOLERANCE = 1e-10
CONTROLS = ({"interval": 2}, {"damping": 0.2})


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, interval: int = 1, beta: float = 0.0, damping: float = 0.1,
    carried: bool = True, lr: float = 0.1,
) -> Tensor:  # fmt: skip
    """carried: False leaves the numbers of the old spectrum where they are when the basis changes, which is wrong."""
    factors: dict[str, list[Tensor]] = {}
    bases: dict[str, Tensor] = {}
    spectra: dict[str, Tensor] = {}
    weight = 0.0

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        nonlocal weight
        weight = beta * weight + (1 - beta)
        inputs, targets = batch
        output = dense.predict(model, inputs).requires_grad_()
        sent = torch.autograd.grad(dense.term_losses(network.criterion, output, targets).sum(), output)[0].unsqueeze(0)
        F = dense.empirical_fisher(model, network.criterion, inputs, targets)
        result = torch.zeros_like(gradient)
        for name in _layers(model):
            pair = dense_kron.kron_expand(model, network.criterion, inputs, targets, sent, name)
            old = factors.get(name, [torch.zeros_like(x) for x in pair])
            factors[name] = [beta * x + (1 - beta) * new for x, new in zip(old, pair, strict=True)]
            where = dense.joint_indices(model, name)
            if step % interval == 0:
                U = dense_eigen.basis([x / weight for x in factors[name]])
                if name in spectra and carried:
                    spectra[name] = dense_eigen.spectrum(U, dense_eigen.matrix(bases[name], spectra[name]))
                bases[name] = U
            S = dense_eigen.spectrum(bases[name], F[where][:, where])
            spectra[name] = beta * spectra.get(name, torch.zeros_like(S)) + (1 - beta) * S
            C = dense_eigen.matrix(bases[name], spectra[name] / weight)
            result[where] = torch.linalg.solve(C + damping * torch.eye(len(C), dtype=C.dtype), gradient[where])
        return result

    return descend(network, batches, direction, lr=lr, momentum=0.9)
