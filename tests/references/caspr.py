"""CASPR (Duvvuri et al. 2024), with the moments, roots and grafting of Distributed Shampoo: P formed as a dense matrix and multiplied out.

A tensor is read as (out, rest); P = ((1/k) sum_m I (x) (F_m + eps I)^(-1/2k) (x) I)^k with F_m an average divided by 1 - 0.999^t; d = P M with M
the bias-corrected average of the gradient, then d |a| / |d|, a = M / (sqrt(v / (1 - 0.999^t)) + 1e-8); before `start` the step is a.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import dense
from precond import transforms
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
_PLAIN: dict[str, Any] = {
    "transforms": [], "history": "local", "start_step": 0, "solver_interval": 1, "damping": {"value": 1e-3},
}  # fmt: skip
_EARLY: dict[str, Any] = {"start_step": 2, "solver_interval": 2, "damping": {"value": 1e-4}}
VARIANTS = {
    "default": ({}, {}),
    "early": (_EARLY, {"start": 2, "interval": 2, "eps": 1e-4}),
    "order_4": (_EARLY | {"repr": {"merge_dims": "none"}}, {"start": 2, "interval": 2, "eps": 1e-4, "merge": False}),
    "no_graft": (_EARLY | {"transforms": [transforms.Momentum(0.9)]}, {"start": 2, "interval": 2, "eps": 1e-4, "graft": False}),
    "one_step": (_PLAIN, {"start": 0, "interval": 1, "eps": 1e-3, "graft": False, "beta1": 0.0, "beta2": 0.0}),
}
ONLY = {"default": ("square",), "order_4": ("conv",)}
STEPS = 14
TOLERANCE = 1e-10
CONTROLS = ({"eps": 1e-5}, {"start": 9}, {"graft": False}, {"product": True})


def _mean(factors: list[Tensor], eps: float, product: bool) -> Tensor:
    k, total = len(factors), 0.0
    roots = []
    for F in factors:
        values, U = torch.linalg.eigh(F)
        roots.append(U @ torch.diag((values + eps) ** (-0.5 / k)) @ U.T)
    if product:  # Shampoo
        return functools.reduce(torch.kron, roots)
    for m in range(k):
        total = total + functools.reduce(torch.kron, [R if j == m else torch.eye(len(R), dtype=R.dtype) for j, R in enumerate(roots)])
    return torch.linalg.matrix_power(torch.as_tensor(total) / k, k)


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, eps: float = 1e-6, start: int = 10, interval: int = 10, merge: bool = True,
    graft: bool = True, product: bool = False, beta1: float = 0.9, beta2: float = 0.999, lr: float = 1e-2,
) -> Tensor:  # fmt: skip
    state: dict[str, dict[str, Any]] = {}

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        pieces = []
        for name, raw in dense.split(gradient, model).items():
            G = raw.reshape(len(raw), -1) if merge and raw.dim() > 1 else raw
            own = state.setdefault(name, {"F": [torch.zeros(n, n, dtype=G.dtype) for n in G.shape], "m": 0 * G, "v": 0 * G})
            unfolded = [G.movedim(m, 0).reshape(n, -1) for m, n in enumerate(G.shape)]
            own["F"] = [beta2 * F + (1 - beta2) * u @ u.T for F, u in zip(own["F"], unfolded, strict=True)]
            own["m"] = beta1 * own["m"] + (1 - beta1) * G
            own["v"] = 0.999 * own["v"] + 0.001 * G**2
            M = own["m"] / (1 - beta1 ** (step + 1))
            adam = M / ((own["v"] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            if step % interval == 0:
                own["P"] = _mean([F / (1 - beta2 ** (step + 1)) for F in own["F"]], eps, product)
            d = (own["P"] @ M.flatten()).reshape(G.shape)
            if graft:
                d = d * (adam.norm() / (d.norm() + 1e-16)) if step >= start else adam
            elif step < start:
                d = M
            pieces.append(d.flatten())
        return torch.cat(pieces)

    return descend(network, batches, direction, lr=lr)
