"""SOAP (Vyas et al. 2024) as released, tensor by tensor in its own coordinates, with Adam's moments kept in the rotated ones.

The first call makes L = 0.05 G G^T, R alike, and their eigenvectors, and moves nothing. Call t = 1, 2, ...: m and v are the moments of
Q_L^T G Q_R, d = m / (sqrt(v) + eps) with both bias-corrected, theta <- theta - lr Q_L d Q_R^T; then L, R take G in, and where t is a multiple
of T, Q <- qr(L Q) with the columns sorted, v sorted alike, m rotated. A vector is Adam's.

Two things differ from the released code, both of the order of rounding in its use: eps is added to the bias-corrected root, as in Adam,
and the weight decay is AdamW's, theta <- (1 - lr wd) theta before the step instead of after it. The network's factors have full rank from the first
gradient on, as a null space has no unique basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dense
import dense_eigen
from references.common import Batch, Drawn, Network, move, theta

NETS = ("square",)
VARIANTS = {
    "default": ({}, {}),
    "interval_3": ({"repr": {"basis_interval": 3}}, {"interval": 3}),
    "interval_1": ({"repr": {"basis_interval": 1}}, {"interval": 1}),
    "capped": ({"repr": {"max_dim": 2, "basis_interval": 3}}, {"max_dim": 2, "interval": 3}),
}
STEPS = 14
TOLERANCE = 1e-10
CONTROLS = ({"interval": 5}, {"beta": 0.9}, {"max_dim": 2}, {"decay": 0.0}, {"skip": False})


class _Tensor:
    """The state of one tensor."""

    def __init__(self, G: Tensor, beta: float, max_dim: int) -> None:
        self.beta, self.m, self.v, self.t = beta, torch.zeros_like(G), torch.zeros_like(G), 0
        rotated = [m for m in range(G.dim()) if G.shape[m] <= max_dim and G.dim() > 1]
        self.F = {m: (1 - beta) * self.outer(G, m) for m in rotated}
        self.Q = {m: torch.linalg.eigh(F)[1].flip(1) for m, F in self.F.items()}

    @staticmethod
    def outer(G: Tensor, mode: int) -> Tensor:
        unfolded = G.movedim(mode, 0).reshape(G.shape[mode], -1)
        return unfolded @ unfolded.T

    def turn(self, X: Tensor, back: bool = False) -> Tensor:
        for mode, Q in self.Q.items():
            X = torch.tensordot(Q if back else Q.T, X, dims=([1], [mode])).movedim(0, mode)
        return X

    def step(self, G: Tensor, eps: float, interval: int) -> Tensor:
        self.t += 1
        turned, correction = self.turn(G), 1 - self.beta**self.t
        self.m = self.beta * self.m + (1 - self.beta) * turned
        self.v = self.beta * self.v + (1 - self.beta) * turned**2
        direction = self.turn(self.m / correction / ((self.v / correction).sqrt() + eps), back=True)
        for mode in self.F:
            self.F[mode] = self.beta * self.F[mode] + (1 - self.beta) * self.outer(G, mode)
        if self.t % interval == 0:
            plain = self.turn(self.m, back=True)
            for mode, F in self.F.items():
                self.Q[mode], order = dense_eigen.iterate(F, self.Q[mode])
                self.v = self.v.index_select(mode, torch.tensor(order))
            self.m = self.turn(plain)
        return direction


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, interval: int = 10, beta: float = 0.95, eps: float = 1e-8,
    max_dim: int = 10000, lr: float = 3e-3, decay: float = 0.01, skip: bool = True,
) -> Tensor:  # fmt: skip
    """skip: False makes a step with the plain gradient of the first call, which is wrong."""
    model, path = network.make(), []
    at = theta(model)
    states: dict[str, _Tensor] = {}
    for batch in batches:
        gradient = dense.gradient(model, network.criterion, *batch)
        if states:
            pieces = [states[name].step(G, eps, interval).flatten() for name, G in dense.split(gradient, model).items()]
            at = (1 - lr * decay) * at - lr * torch.cat(pieces)
        else:
            states = {name: _Tensor(G, beta, max_dim) for name, G in dense.split(gradient, model).items()}
            at = at if skip else (1 - lr * decay) * at - lr * gradient
        move(model, at)
        path.append(at.clone())
    return torch.stack(path)
