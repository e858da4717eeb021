"""What the references of PSGD share: the loop, with a Q for each part of the parameters, from the papers (`dense_psgd`).

A step: v the recorded normal vector, h = H v (whitening: h = g), h <- h + (delta + eps |h|) v' with the recorded noise v' (whitening: v' = v), every
part's Q moves by its own share of v and h, then d = Q^T Q m with m the bias-corrected average of the gradients. The first Q is
((mean h^4 + delta^4)^(-1/8) (mean v^2)^(1/4)) I, without the last factor for whitening.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import dense
import dense_psgd
from references.common import Batch, Drawn, Network, descend


class Factor(Protocol):
    def start(self, scale: float) -> None: ...
    def move(self, v: Tensor, h: Tensor) -> None: ...
    def whole(self) -> Tensor:
        """Q."""


class Modes:
    """Q_1 (x) ... (x) Q_k, dense or diagonal."""

    def __init__(self, sizes: Sequence[int], forms: Sequence[str], *, initial: float | None, **options: Any) -> None:
        """options: of `dense_psgd.modes`."""
        self.sizes, self.forms, self.initial, self.options = tuple(sizes), tuple(forms), initial, options
        self.factors: list[Tensor] = []
        self.L = [0.0] * len(self.sizes)

    def start(self, scale: float) -> None:
        share = (scale if self.initial is None else self.initial) ** (1 / len(self.sizes))
        self.factors = [share * torch.eye(n, dtype=torch.float64) for n in self.sizes]

    def move(self, v: Tensor, h: Tensor) -> None:
        self.factors, self.L = dense_psgd.modes(self.factors, self.forms, self.L, v.unsqueeze(0), h.unsqueeze(0), **self.options)

    def whole(self) -> Tensor:
        return dense_psgd.kron(self.factors)


class LowRank:
    """(I + U V^T) diag(d), from the recorded U and V, of which the recorded one moves."""

    def __init__(self, U: Tensor, V: Tensor, moves: Sequence[bool], *, step: float) -> None:
        self.U, self.V, self.moves, self.step = U, V, iter(moves), step
        self.d = torch.empty(0)
        self.L = dict.fromkeys(("Lu", "Lv", "Ld"), 0.0)

    def start(self, scale: float) -> None:
        self.d = torch.full((len(self.U),), scale, dtype=torch.float64)

    def move(self, v: Tensor, h: Tensor) -> None:
        self.U, self.V, self.d = dense_psgd.low_rank(self.U, self.V, self.d, v, h, self.L, step=self.step, U_moves=next(self.moves))

    def whole(self) -> Tensor:
        return (torch.eye(len(self.d), dtype=torch.float64) + self.U @ self.V.T) @ self.d.diag()


def train(
    network: Network, batches: list[Batch], drawn: Drawn, parts: Callable[[nn.Module], list[tuple[Tensor, Factor]]], *, damping: float, momentum: float,
    whitening: bool, clip: tuple[float, float] | None, lr: float, of_momentum: bool = False,
) -> Tensor:  # fmt: skip
    """parts: (the indices of the parameters in theta, their Q). clip: the largest root of the mean square of a part's direction, and entry of it.

    of_momentum: what is whitened is m.
    """
    probes, noise = iter(drawn.probes), iter(drawn.noise)
    held: list[tuple[Tensor, Factor]] = []
    average: Tensor | float = 0.0

    def direction(model: nn.Module, step: int, batch: Batch, g: Tensor) -> Tensor:
        nonlocal average
        average = momentum * average + (1 - momentum) * g
        m, v = average / (1 - momentum ** (step + 1)), next(probes)[0]
        h = (m if of_momentum else g) if whitening else dense.hessian(model, network.criterion, *batch) @ v
        held.extend(parts(model) if not held else [])
        d = torch.zeros_like(g)
        for at, Q in held:
            own, its = v[at], h[at]
            its = its + (damping + torch.finfo(g.dtype).eps * its.abs()) * (own if whitening else next(noise).flatten())
            if step == 0:
                Q.start(float((its**4).mean() + damping**4) ** -0.125 * (1.0 if whitening else float((own**2).mean()) ** 0.25))
            Q.move(own, its)
            d[at] = Q.whole().T @ Q.whole() @ m[at]
            if clip is not None:
                d[at] = (d[at] * min(1.0, clip[0] / float((d[at] ** 2).mean().sqrt()))).clamp(-clip[1], clip[1])
        return d

    return descend(network, batches, direction, lr=lr)
