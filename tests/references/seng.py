"""SENG (Yang et al. 2022) by the rows of each layer: d = (1/l) [g - U^T (l I + K)^-1 U g], rows u_i / sqrt(N), K = U U^T.

By example and in parameter order. "sketch": K of a weight is that of q of its inputs and q of its outputs, times in out / q^2, as the
coordinates recorded say, plus that of the bias on q^2 of its entries, times out / q^2; U itself is whole. "positions": the output gradients (R, out)
of an example of a convolution are replaced by the nearest ones of that rank, where its gradient has more numbers than its factors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dense
import dense_kron
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv", "channels")
VARIANTS = {
    "default": ({}, {}),
    "sketch": ({"repr": {"sketch": 2}}, {"q": 2}),
    "positions": ({"repr": {"positions": 2}}, {"positions": 2}),
    "damping": ({"damping": 0.5}, {"damping": 0.5}),
    "every_step": ({"curvature_interval": 1}, {"interval": 1}),
}
ONLY = {"sketch": ("mlp",), "positions": ("channels",), "damping": ("conv",), "every_step": ("mlp",)}
STEPS = 12
TOLERANCE = 1e-10
CONTROLS = ({"interval": 9}, {"damping": 0.11}, {"layers": False})


def _cut(model: nn.Module, network: Network, batch: Batch, rows: Tensor, positions: int) -> Tensor:
    """The rows with the gradients of each convolution's weight made of a few positions."""
    output = dense.predict(model, batch[0]).requires_grad_()
    sent = torch.autograd.grad(dense.term_losses(network.criterion, output, batch[1]).sum(), output)[0].unsqueeze(0)
    rows = rows.clone()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            ((a, g),) = dense_kron.capture(model, batch[0], sent, name)
            a = a[..., : module.weight[0].numel()]
            if module.weight.numel() <= a[0].numel() + g[0, 0].numel():
                continue
            P, S, Q = torch.linalg.svd(g[0], full_matrices=False)
            near = (P[..., :positions] * S[:, None, :positions]) @ Q[:, :positions]
            rows[:, dense.positions(model)[f"{name}.weight"]] = (near.mT @ a).flatten(1)
    return rows


def _gram(rows: dict[str, Tensor], drawn: dict[str, Tensor], q: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(rows.values()):
        for side, dim in (("g", 1), ("a", 2)):
            if f"{side}{i}" in drawn:
                index = drawn[f"{side}{i}"]
                assert len(index.unique()) == len(index) == (q if x.dim() > 2 else q**2) < x.shape[dim]
                x = x.index_select(dim, index) * (x.shape[dim] / len(index)) ** 0.5
        total = total + x.flatten(1) @ x.flatten(1).T
    return total


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, damping: float = 0.1, interval: int = 10, q: int | None = None,
    positions: int | None = None, layers: bool = True,
) -> Tensor:  # fmt: skip
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    coordinates = iter(drawn.coordinates)

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        if step % interval == 0:
            rows = dense.per_example_gradients(model, network.criterion, *batch)
            rows = (rows if positions is None else _cut(model, network, batch, rows, positions)) / len(rows) ** 0.5
            groups = [names for _, names in dense.layer_groups(model)]
            held.clear()
            for names in groups if layers else [[name for group in groups for name in group]]:
                where = torch.cat([torch.arange(rows.shape[1])[dense.positions(model)[name]] for name in names])
                tensors = dense.split(rows, model)
                K = _gram({name: tensors[name] for name in names}, {} if q is None else next(coordinates), q or 0)
                held.append((where, rows[:, where], torch.linalg.inv(damping * torch.eye(len(rows), dtype=rows.dtype) + K)))
        result = torch.zeros_like(gradient)
        for where, U, inverse in held:
            g = gradient[where]
            result[where] = (g - U.T @ (inverse @ (U @ g))) / damping
        return result

    return descend(network, batches, direction, lr=0.03, momentum=0.9)
