"""Distributed Shampoo (Anil et al. 2020; Shi et al. 2023), tile by tile: a tensor is read as (out, rest), or, as released, without dimensions of 1 and with
neighbours merged from the last one backwards while their product is at most `cap`; longer dimensions are cut into as few pieces as there can be, as
equal as they can be (released: pieces of `cap` and a rest).

A tile of order k keeps F_m, an average divided by 1 - beta2^t, or the plain sum. M is the bias-corrected average of the gradient, with Nesterov that
with beta3 = beta1^2. From step `start` on d = (F_1^(-1/2k) (x) ... (x) F_k^(-1/2k)) M with eps I added to each factor and the roots of every
`interval`-th step; then d |a| / |d| with a = M / (sqrt(v / (1 - beta2^t)) + eps_a), v of the raw gradient. Before `start` the step is a.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dense
from precond import damping, transforms
from references.common import Batch, Drawn, Network, descend

_EPS = 1e-4  # stale roots of a null space multiply rounding by eps^(-1/2)
_CALM: dict[str, Any] = {"damping": damping.Floor(_EPS, policy="shift", factors=True)}
_MERGED = {"merge_dims": "last", "squeeze": True}
_EARLY = _CALM | {"start_step": 2, "solver_interval": 2}
_early: dict[str, Any] = {"eps": _EPS, "start": 2, "interval": 2}
_ADAM = transforms.Graft("adam")
NETS = ("square",)
ONLY = {name: ("mlp", "conv") for name in ("tiles", "released_roots", "sum", "nesterov", "no_graft", "merged")} | {"order_4": ("conv",)}
VARIANTS = {
    "default": ({}, {}),
    "tiles": (_EARLY | {"repr": {"max_dim": 8}}, _early | {"cap": 8}),
    "merged": (_EARLY | {"repr": _MERGED | {"max_dim": 8}}, _early | {"cap": 8, "merge": "last"}),
    "merged_whole": (_EARLY | {"repr": _MERGED}, _early | {"merge": "last"}),
    "order_4": (_EARLY | {"repr": {"merge_dims": "none"}}, _early | {"merge": "none"}),
    "released_roots": (_CALM | {"start_step": 2, "solver_interval": lambda step: (step + 1) % 3 == 0}, _early | {"interval": 3, "offset": 1}),
    "sum": (_EARLY | {"history": {"name": "Sum"}, "repr": {"max_dim": 8}}, _early | {"beta2": 1.0, "cap": 8}),
    "nesterov": (_EARLY | {"transforms": [transforms.Momentum(0.9, nesterov=True), _ADAM]}, _early | {"beta3": 0.81}),
    "no_graft": (_EARLY | {"transforms": [transforms.Momentum(0.9)], "repr": {"max_dim": 8}}, _early | {"graft": None, "cap": 8}),
    "graft_sgd": (_EARLY | {"transforms": [transforms.Momentum(0.9), transforms.Graft("sgd")]}, _early | {"graft": "sgd"}),
}
STEPS = 14
TOLERANCE = 1e-10
CONTROLS = ({"eps": 1e-5}, {"start": 9}, {"merge": "last"}, {"beta1": 0.8}, {"graft": None}, {"interval": 3})


def _shape(shape: tuple[int, ...], cap: int, merge: str) -> list[int]:
    if merge != "last":
        return [shape[0], math.prod(shape[1:])] if merge == "rest" and len(shape) > 1 else list(shape)
    sizes = [n for n in shape if n != 1] or [1]
    while True:
        last = next((m for m in range(len(sizes) - 1, 0, -1) if sizes[m - 1] * sizes[m] <= cap), None)
        if last is None:
            return sizes
        sizes[last - 1 : last + 1] = [sizes[last - 1] * sizes[last]]


def _places(shape: list[int], cap: int) -> list[Tensor]:
    """The flat positions of every tile, each in the tile's shape."""
    lines = []
    for n in shape:
        count = math.ceil(n / cap)
        lines.append(torch.arange(n).split([n // count + (i < n % count) for i in range(count)]))
    grid = torch.arange(math.prod(shape)).reshape(shape)
    return [grid[torch.meshgrid(*chosen, indexing="ij")] for chosen in itertools.product(*lines)]


def _root(F: Tensor, eps: float, degree: int) -> Tensor:
    values, U = torch.linalg.eigh(F)
    return U @ torch.diag((values + eps) ** (-1.0 / degree)) @ U.T


class _Tile:
    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        self.shape, self.options, self.t = shape, options, 0
        self.F = [torch.zeros(n, n, dtype=torch.float64) for n in shape]
        self.m = self.v = torch.zeros(shape, dtype=torch.float64)
        self.roots: Tensor | None = None

    def step(self, G: Tensor, due: Callable[[int], bool]) -> Tensor:
        o, k = self.options, G.dim()
        beta1, beta2, beta3 = o["beta1"], o["beta2"], o["beta3"] or o["beta1"]
        take, self.t = (1.0 if beta2 == 1 else 1 - beta2), self.t + 1
        for m, n in enumerate(self.shape):
            unfolded = G.movedim(m, 0).reshape(n, -1)
            self.F[m] = beta2 * self.F[m] + take * unfolded @ unfolded.T
        M = (beta3 * self.m + (1 - beta3) * G) / (1 - beta3 * beta1 ** (self.t - 1))
        self.m = beta1 * self.m + (1 - beta1) * G
        self.v = 0.999 * self.v + 0.001 * G**2
        step = {"adam": M / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8), "sgd": M, None: M}[o["graft"]]
        if due(self.t - 1):
            correction = 1.0 if beta2 == 1 else 1 - beta2**self.t
            self.roots = functools.reduce(torch.kron, [_root(F / correction, o["eps"], 2 * k) for F in self.F])
        if self.t - 1 < o["start"]:
            return step
        assert self.roots is not None
        d = (self.roots @ M.flatten()).reshape(G.shape)
        return d if o["graft"] is None else d * (step.norm() / (d.norm() + 1e-16))


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, eps: float = 1e-12, start: int = 10, interval: int = 10, offset: int = 0,
    cap: int = 1024, merge: str = "rest", beta1: float = 0.9, beta2: float = 0.999, beta3: float | None = None, graft: str | None = "adam",
    lr: float = 1e-2,
) -> Tensor:  # fmt: skip
    """offset: roots are made at steps t with t + offset a multiple of the interval, counted from 0."""
    tiles: dict[str, list[_Tile]] = {}

    def due(step: int) -> bool:
        return (step + offset) % interval == 0

    def direction(model: nn.Module, step: int, batch: Batch, gradient: Tensor) -> Tensor:
        pieces = []
        for name, G in dense.split(gradient, model).items():
            places = _places(_shape(tuple(G.shape), cap, merge), cap)
            if name not in tiles:
                made = [_Tile(tuple(p.shape), eps=eps, start=start, beta1=beta1, beta2=beta2, beta3=beta3, graft=graft) for p in places]
                tiles[name] = made
            out = torch.zeros_like(G.flatten())
            for place, tile in zip(places, tiles[name], strict=True):
                out[place] = tile.step(G.flatten()[place], due)
            pieces.append(out)
        return torch.cat(pieces)

    return descend(network, batches, direction, lr=lr)
