"""SMW-NG (Ren & Goldfarb 2019): (F + l I) d = g by a dense solve, F the empirical Fisher of the batch over all parameters.

theta <- theta - lr d, then l follows the step s = -lr d as Levenberg and Marquardt have it: rho is the change of the batch's loss over
q = g^T s + s^T (F + l I) s / 2; l <- l / 1.01 where rho > 3/4, 1.01 l where rho < 1/4 or the loss rose. Without l in q: "plain_ratio".
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dense
from references.common import Batch, Drawn, Network, move, theta

NETS = ("mlp", "conv")
_NUMBER, _PLAIN = {"damping": 0.3}, {"damping": {"include_damping": False}}
VARIANTS = {
    "default": ({}, {}),
    "bold": ({"damping": {"value": 1e-3}}, {"damping": 1e-3}),  # rho is below, between and above the thresholds
    "fixed": (_NUMBER, {"damping": 0.3, "factor": 1.0}),
    "plain_ratio": (_PLAIN, {"include": False}),
    "fisher_mc": ({"matrix": "fisher_mc"}, {"matrix": "fisher_mc"}),
    "rows": ({"repr": "full_low_rank"}, {}),
}
ONLY = {"plain_ratio": ("mlp",), "fisher_mc": ("mlp",), "rows": ("mlp",)}
STEPS = 6
TOLERANCE = 1e-10
CONTROLS = ({"factor": 1.0}, {"factor": 1 / 1.02}, {"damping": 0.11}, {"matrix": "ggn"})

Oracle = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]


def _sampled(drawn: Drawn) -> Oracle:
    seen = iter(drawn.labels)

    def oracle(model: nn.Module, criterion: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        output = dense.predict(model, inputs)
        labels = nn.functional.one_hot(next(seen), output.shape[1])
        return dense.fisher_mc(model, criterion, inputs, targets, (output.softmax(1) - labels).unsqueeze(0))

    return oracle


def ratio(change: Tensor, model: Tensor) -> float:
    return float("-inf") if change > 0 else float(change / model)


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, matrix: str = "empirical_fisher", damping: float = 0.1,
    factor: float = 1 / 1.01, include: bool = True, lr: float = 0.3,
) -> Tensor:  # fmt: skip
    model, path, oracle = network.make(), [], _sampled(drawn) if matrix == "fisher_mc" else getattr(dense, matrix)
    loss = functools.partial(_loss, model, network.criterion)
    at = theta(model)
    for batch in batches:
        g, F, before = dense.gradient(model, network.criterion, *batch), oracle(model, network.criterion, *batch), loss(batch)
        eye = torch.eye(len(g), dtype=g.dtype)
        s = -lr * torch.linalg.solve(F + damping * eye, g)
        at = at + s
        move(model, at)
        path.append(at.clone())
        rho = ratio(loss(batch) - before, g @ s + s @ (F + (damping if include else 0.0) * eye) @ s / 2)
        damping = damping * factor if rho > 0.75 else damping / factor if rho < 0.25 else damping
    return torch.stack(path)


def _loss(model: nn.Module, criterion: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = criterion(dense.predict(model, batch[0]), batch[1])
    return loss
