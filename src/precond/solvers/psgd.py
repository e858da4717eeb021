"""The factor of a preconditioner, learned by stochastic gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping
from precond.operators import Absolute, FitName, Operator, Pairs, RootShifted, Shifted, mode_products
from precond.randomness import keyed_generator
from precond.solvers import psgd_low_rank, psgd_modes
from precond.solvers.base import REGISTRY, Solver, State
from precond.solvers.probing import Structure, fit_of, probed
from precond.solvers.psgd_modes import Bound

Update = Literal["EQ", "Q0.5EQ1.5"]
Normaliser = Literal["curvature", "largest"]


@REGISTRY.register("psgd")
@dataclass(frozen=True, kw_only=True)
class PSGD(Solver):
    """P = Q^T Q, Q following the gradient of E[h^T P h + v^T P^-1 v] over a group: it needs pairs (v, h) of a matrix, or products
    with one, and no inverse.

    P tends to E[h h^T]^(-1/2): of pairs h = C v that is |C|^-1, whatever the signs of C's eigenvalues, of gradients h and noise v
    (whitening) E[g g^T]^(-1/2). It averages in Q, which moves by one step a refresh; a history would average twice. With one pair and an
    indefinite C a noise in proportion to `step` remains. Q has the structure of the representation: triangular, diagonal, one
    factor a mode (Kronecker), or (I + U V^T) diag(d).

    Of any other operator it makes the pairs itself, v normal and h = (C + damping I) v, and P tends to |C + damping I|^-1. Of an absolute
    value |C| it takes products with C, since the fit makes the absolute value: P tends to (C^2 + damping^2 I)^(-1/2).

    Args:
        update: "EQ": dQ = E Q with E the upper triangle of a a^T - b b^T, a = Q h, b = Q^-T v, by mode for Kronecker factors; the diagonal
            of Q stays positive for step <= 1. "Q0.5EQ1.5": no inverse, dQ = (P h h^T P - v v^T) Q, with E[v v^T] in closed form for
            whitening, then a rotation towards a symmetric Q. A low-rank Q has an update of its own.
        normaliser: what the step is divided by. "curvature": a smoothed bound L <- max(decay L + (1 - decay) l, l) of the norm l of a a^T + b b^T;
            "largest": the largest entry of the gradient, as in the versions of 2015 to 2018.
        bound: of that norm for a dense factor. "diagonal": |S x| / |x|, x the column of S = a a^T + b b^T with the largest diagonal entry, and
            the trace for "EQ" with one mode; "column": x = S c, c the longest column, as in the versions before 2025 and kron-torch.
        step: None: 0.1, or 0.01 with "largest". decay: of L.
        initial: Q starts as initial times I; None: (E h^4)^(-1/8) (E v^2)^(1/4) of the first pair.
        seed: keys the probes, the noise and the choice between U and V, with the number of the update.
        structure: of Q where an operator is given that is no pair: "natural", that of the operator, (I + U V^T) diag(d) where it has none;
            or "dense", "diagonal", "low_rank". rank: of U and V there.
        probes: products for each update there; n and more are n, the unit vectors, and make the update the expected one.
        updates: of each refresh there.

    Of pairs, damping delta adds (delta + eps |h|) v' to h with v' normal, v itself for whitening: P is then (E[h h^T] + delta^2 I)^(-1/2), below
    I / delta. Cost a refresh, for n_m in each mode: n n_m, and n_m^3 where Q is multiplied, n^2 a pair for "EQ" with one mode; applied, 2 n n_m.

    Sources: Li, "Preconditioned stochastic gradient descent", 2018, arXiv 1512.04202; "Preconditioner on matrix Lie group for SGD", 2019,
    arXiv 1809.10232; "Black box Lie group preconditioners for SGD", 2022, arXiv 2211.04422; arXiv 2402.11858, 2024.

    >>> from precond.damping import Tikhonov
    >>> solver, state = PSGD(initial=1.0), {}
    >>> for _ in range(200):
    ...     state = solver.refresh(state, Pairs(torch.ones(2), torch.tensor([2.0, 4.0]), "diagonal"), Tikhonov(0.0))
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([0.5000, 0.2500])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset((Operator,))
    live: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    follows: ClassVar[tuple[str, ...]] = ("pairs", "whitening")
    fits: ClassVar[frozenset[FitName]] = frozenset({"dense", "diagonal", "kronecker", "low_rank"})

    update: Update = "EQ"
    normaliser: Normaliser = "curvature"
    bound: Bound = "diagonal"
    step: float | None = None
    decay: float = 0.9
    initial: float | None = None
    seed: int = 0
    structure: Structure = "natural"
    rank: int = 10
    probes: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        for name, known in (("update", Update), ("normaliser", Normaliser), ("bound", Bound), ("structure", Structure)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise ValueError(f"PSGD({name}={value!r}): choose {' or '.join(map(repr, get_args(known)))}.")
        if self.step is not None and not 0 < self.step <= 1:
            raise ValueError(f"PSGD(step={self.step}): the step lies in (0, 1], where Q stays invertible.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"PSGD(decay={self.decay}): the weight of the old norm lies in [0, 1).")
        if self.initial is not None and not 0 < self.initial < math.inf:
            raise ValueError(f"PSGD(initial={self.initial}): the first Q is a positive multiple of I, or None for that of the first pair.")
        if min(self.rank, self.probes, self.updates) < 1:
            raise ValueError(f"PSGD(rank={self.rank}, probes={self.probes}, updates={self.updates}): each is at least 1.")

    def damped(self, operator: Operator, damping: Damping) -> Operator:
        damped = damping(operator, self.power)
        if isinstance(damped, Shifted) and isinstance(damped.operator, Absolute):  # what noise in products with C itself makes of it
            return RootShifted(damped.operator, damped.shift**2, 2.0)
        return damped

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        given, delta = _without_shift(self.damped(operator, damping))
        if isinstance(given, Pairs):
            return self._updated(state, given, delta)
        fit = fit_of(given, self.structure, self.rank)
        for _ in range(self.updates):
            v, h = probed(given, self.probes, self._generator("probes", state.get("updates", 0), given.n))
            state = self._updated(state, Pairs(v, h, fit), delta)
        return state

    def _updated(self, state: State, pairs: Pairs, delta: float | Tensor) -> State:
        """After one update."""
        count: int = state.get("updates", 0)
        h = pairs.h + (delta + torch.finfo(pairs.dtype).eps * pairs.h.abs()) * self._noise(pairs, count)
        start = state.get("Q") or self._start(pairs, h, delta)
        fit, learn = pairs.structure, self._learner()
        if fit.name == "low_rank":
            U_moves = bool(torch.rand((), generator=self._generator("U or V", count, fit.n)) < 0.5)
            Q = psgd_low_rank.learn(_cast(start, h), pairs.v, h, learn, U_moves=U_moves)
        else:
            ends = (-1, fit.batch, *fit.sizes)
            Q = psgd_modes.learn(
                _cast(start, h), pairs.v.reshape(ends), h.reshape(ends), learn, count, inverse_free=self.update != "EQ", whitening=pairs.whitening,
                bound=self.bound,
            )
        return {"Q": Q, "updates": count + 1, "sizes": (fit.batch, *fit.sizes)}

    def _noise(self, pairs: Pairs, count: int) -> Tensor:
        if pairs.whitening:
            return pairs.v
        drawn = torch.randn(pairs.h.shape, dtype=pairs.dtype, generator=self._generator("damping", count, pairs.n))
        return drawn.to(pairs.device)

    def _generator(self, *key: int | str) -> torch.Generator:
        return keyed_generator(torch.device("cpu"), "psgd", self.seed, *key)

    def _start(self, pairs: Pairs, h: Tensor, delta: float | Tensor) -> State:
        """Q = scale I."""
        size = h.square().square().mean() + torch.as_tensor(delta, dtype=h.dtype, device=h.device) ** 4
        scale = torch.where(size > 0, size, 1.0) ** -0.125 * (1.0 if pairs.whitening else pairs.v.square().mean() ** 0.25)
        if self.initial is not None:
            scale = torch.full_like(scale, self.initial)
        if pairs.structure.rank is not None:
            return psgd_low_rank.start(scale, pairs.n, pairs.structure.rank, self._generator("start", pairs.n))
        return psgd_modes.start(scale, pairs.structure)

    def _learner(self) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(the old L, the norm l, the gradient) -> (what a gradient is multiplied by, the new L)."""
        step = self.step or (0.1 if self.normaliser == "curvature" else 0.01)

        def rate(L: Tensor, norm: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
            if self.normaliser == "largest":
                L = gradient.abs().flatten(L.dim()).amax(-1)
            else:
                L = torch.maximum(self.decay * L + (1 - self.decay) * norm, norm)
            return step / torch.where(L > 0, L, 1.0), L

        return rate

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        Q = state["Q"]
        if "U" in Q:
            return psgd_low_rank.applied(Q, V), state
        X = V.reshape(*state["sizes"], -1)
        factors = psgd_modes.factors(Q, len(state["sizes"]) - 1)
        return mode_products(factors, mode_products(factors, X), transpose=True).reshape(V.shape), state


def _without_shift(damped: Operator) -> tuple[Operator, float | Tensor]:
    """What pairs are taken of, and the size of the noise that stands for the damping: of pairs, and of C where |C| is meant."""
    if isinstance(damped, Shifted) and isinstance(damped.operator, Pairs):
        return damped.operator, damped.shift
    if isinstance(damped, RootShifted) and isinstance(damped.operator, Absolute) and damped.power == 2:
        return damped.operator.operator, damped.shift**0.5
    return (damped.operator if isinstance(damped, Absolute) else damped), 0.0


def _cast(state: State, like: Tensor) -> State:
    return {name: value.to(like) for name, value in state.items()}
