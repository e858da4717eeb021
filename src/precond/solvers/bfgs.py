"""The BFGS iteration on the inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from precond.damping import Damping, Factored, Tikhonov
from precond.errors import SolverFailure
from precond.operators import (
    Dense,
    Diagonal,
    FitName,
    Kronecker,
    Operator,
    Pairs,
    Probed,
    Secant,
    SecantKronecker,
    SecantMemory,
    Shifted,
    pack,
    unpack,
)
from precond.operators.kronecker import matrices
from precond.randomness import keyed_generator
from precond.secant import PairRule
from precond.solvers import bfgs_probes
from precond.solvers.base import REGISTRY, Solver, State
from precond.solvers.probing import Structure, fit_of


@REGISTRY.register("bfgs")
@dataclass(frozen=True, kw_only=True)
class BFGS(Solver):
    """H <- (I - rho s y^T) H (I - rho y s^T) + rho s s^T, rho = 1 / s^T y: the inverse follows the pairs, n^2 a pair and no inversion.

    The first H is the exact inverse of the damped operator, or `initial` times I. Afterwards each refresh moves H by the newest
    pair alone, damped by the pair's own rule, so that H y = s along it; damping adds damping s to y. Of a Kronecker operator
    each factor has an H: one with a pair follows it, one with a probe v follows the pair (H v, A H v) and tends to A^-1
    ("Hessian-action" BFGS), any other is inverted. An application is a product with H.

    Of the last m pairs (L-BFGS; the output factor of K-BFGS(L)) nothing is carried over: H is their exact inverse in compact form, damped
    like any other matrix, m^2 n a refresh and 4 m n an application; without damping it is what the two-loop recursion applies.

    Of any matrix that has products it is given pairs (v, C v): H starts from I, or `initial` times it, scaled by the first pair where none
    is given, and follows them undamped, dense or entry by entry; pairs of negative curvature are passed over.

    Of any other operator C it makes the pairs itself, (s, C s + damping s) with v random and s = H v, or every other time v itself: the
    first H is the inverse of the damped C by n of them, which end there on any definite C, or `initial` times I; then H moves by `probes`
    pairs a refresh. A Kronecker product is followed factor by factor where its damping is that of its factors, any other operator as a whole.

    Args:
        initial: see above. seed: keys v, with the number of the refresh.
        structure: of H where an operator is given that has no pair: "natural", that of the operator, dense where it is neither diagonal nor
            Kronecker; or "dense", "diagonal". probes: products a refresh there.

    Sources: Broyden, Fletcher, Goldfarb and Shanno, 1970; Liu & Nocedal, 1989; Goldfarb, Ren & Bahamou (K-BFGS), 2020.

    Raises:
        SolverFailure: the first damped operator is not positive definite.

    >>> B = Secant(2 * torch.eye(2), s=torch.zeros(2), y=torch.zeros(2))
    >>> state = BFGS().init(B, Tikhonov(0.0))
    >>> state = BFGS().refresh(state, Secant(B.matrix, s=torch.tensor([1.0, 0.0]), y=torch.tensor([4.0, 0.0])), Tikhonov(0.0))
    >>> BFGS().apply(state, torch.ones(2))[0]
    tensor([0.2500, 0.5000])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset((Operator,))
    live: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    follows: ClassVar[tuple[str, ...]] = ("secant", "layer_secant", "successive", "pairs")
    fits: ClassVar[frozenset[FitName]] = frozenset({"dense", "diagonal"})
    needs_definite: ClassVar[bool] = True

    initial: float | None = None
    seed: int = 0
    structure: Structure = "natural"
    probes: int = 1

    def __post_init__(self) -> None:
        if self.structure not in ("natural", "dense", "diagonal") or self.probes < 1:
            raise ValueError(f"BFGS(structure={self.structure!r}, probes={self.probes}): choose 'natural', 'dense' or 'diagonal', and at least 1 probe.")
        if self.initial is not None and not self.initial > 0:
            raise ValueError(f"BFGS(initial={self.initial}): the first inverse is a positive multiple of I, or None for that of the operator.")

    def natural_damping(self, structure: type[Operator]) -> type[Damping]:
        return Factored if issubclass(structure, Kronecker) else Tikhonov

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        damped = self.damped(operator, damping)
        memory, shift = (damped.operator, damped.shift) if isinstance(damped, Shifted) else (damped, 0.0)
        if isinstance(memory, Pairs):
            return self._follow(state, memory, shift)
        if isinstance(memory, SecantMemory):
            return {"inverse": pack(memory.inverse(shift))}
        if isinstance(memory, Secant):
            return self._factors(state, (memory.plus(shift),), 1.0)
        if isinstance(damped, SecantKronecker):
            return self._factors(state, damped.materialise().factors, damped.scale)
        if isinstance(memory, SecantKronecker):
            self.refuse(damped, "its damping is not factor-wise; use Factored damping")
        if isinstance(damped, Kronecker) and self.structure == "natural":
            return self._factors(state, [F if _remembers(F) else matrices(F) for F in damped.materialise().factors], damped.scale)
        return self._factors(state, (damped,), 1.0)

    def _factors(self, state: State, factors: Sequence[Operator], scale: float | Tensor) -> State:
        """The inverse of each factor, from the old ones."""
        old, count = state.get("factors", {}), state.get("refreshes", 0)
        made = {str(m): self._factor(old.get(str(m)), F, (count, m)) for m, F in enumerate(factors)}
        inverse = 1 / scale if isinstance(scale, Tensor) or scale else math.inf
        if not bool(torch.as_tensor(inverse).isfinite().all()):
            raise SolverFailure(f"the {self.name} solver was given a Kronecker operator of scale 0, which is singular: increase the damping.")
        return {"factors": made, "scale": inverse, "refreshes": count + 1}

    def _follow(self, state: State, pairs: Pairs, shift: float | Tensor) -> State:
        """The inverse after pairs (v, C v), one after another."""
        fit = pairs.structure
        if fit.name not in self.fits:
            self.refuse(pairs, f"it fits a dense or a diagonal structure to pairs, not a {fit.name} one")
        ends = (fit.batch, fit.n // fit.batch) if fit.name == "dense" else (fit.n, 1)
        s, y = pairs.v.view(-1, *ends), (pairs.h + shift * pairs.v).view(-1, *ends)
        if "factors" in state:
            H, counted = state["factors"]["0"]["inverse"].to(s), state["factors"]["0"]["pairs"]
        else:
            H = (self.initial or 1.0) * torch.eye(ends[1], dtype=s.dtype, device=s.device).expand(*ends, ends[1]).clone()
            counted = _none(s[0])
        rule = PairRule(powell=0.0, scale_initial=self.initial is None)  # a product has no noise that would have to be damped
        for step, change in zip(s, y, strict=True):
            H, counts = rule.inverse(H, step, change, counted == 0)
            counted = counted + counts
        return {"factors": {"0": {"inverse": H, "pairs": counted}}, "scale": 1.0}

    def _factor(self, old: State | None, F: Operator, key: tuple[int, int]) -> State:
        """The inverse of one factor, moved by its pair where there is an old one."""
        if isinstance(F, Diagonal) and self.structure != "dense":
            return {"diagonal": _reciprocal(F.values)}
        memory, shift = (F.operator, F.shift) if isinstance(F, Shifted) else (F, 0.0)
        if isinstance(memory, SecantMemory):
            return {"packed": pack(memory.inverse(shift))}
        if isinstance(F, Secant):
            if old is None and self.initial is None:
                return {"inverse": self._inverse(F.matrix), "pairs": _none(F.s)}
            H = _identity(F.matrix) * (self.initial or 1.0) if old is None else old["inverse"].to(F.matrix)
            pairs = _none(F.s) if old is None else old["pairs"]
            H, counts = F.rule.inverse(H, F.s, F.y, pairs == 0)
            return {"inverse": H, "pairs": pairs + counts}
        if not isinstance(F, Probed):
            return self._probed(old, F, key)
        if old is None:
            return {"inverse": self._inverse(F.matrix)}
        H = old["inverse"].to(F.matrix)
        s = bfgs_probes.step(H, F.probe)
        y = (F.matrix @ s.unsqueeze(-1)).squeeze(-1)
        return {"inverse": PairRule(powell=0.0).inverse(H, s, y, _none(s) == 0)[0]}

    def _probed(self, old: State | None, C: Operator, key: tuple[int, int]) -> State:
        """The inverse of an operator by its products."""
        fit = fit_of(C, "dense" if self.structure == "natural" else self.structure, 1)
        b, n = (fit.n, 1) if fit.name == "diagonal" else (fit.batch, fit.sizes[0])
        generator, like = keyed_generator(torch.device("cpu"), "bfgs", self.seed, *key), torch.zeros(b, n, dtype=C.dtype, device=C.device)
        H = (self.initial or 1.0) * torch.diag_embed(torch.ones_like(like)) if old is None else old["inverse"].to(like).reshape(b, n, n)
        pairs, exact = _none(like) if old is None else old["pairs"], old is None and self.initial is None
        H, counted = bfgs_probes.follow(
            H, lambda s: (C @ s.reshape(-1)).reshape(b, n), n if exact else self.probes, PairRule(powell=0.0, scale_initial=self.initial is None),
            pairs, lambda: torch.randn(b, n, dtype=C.dtype, generator=generator).to(C.device), everywhere=key[0] % 2 == 1,
        )  # fmt: skip
        if exact and bool((counted < n).any()):
            self._fail((fit.n, fit.n))
        return {"inverse": H.reshape(*(C.batch if fit.name == "dense" else (b,)), n, n), "pairs": counted}

    def _fail(self, shape: Sequence[int]) -> NoReturn:
        raise SolverFailure(
            f"the {self.name} solver starts from the inverse of a matrix {tuple(shape)} that is not positive definite: increase the damping."
        )

    def _inverse(self, A: Tensor) -> Tensor:
        L, info = torch.linalg.cholesky_ex((A + A.mT) / 2)
        if bool((info != 0).any()):
            self._fail(A.shape)
        return torch.cholesky_inverse(L)

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        if "inverse" in state:
            return unpack(state["inverse"]) @ V, state
        inverses = [_inverse_of(f) for f in state["factors"].values()]
        if len(inverses) == 1 and isinstance(state["scale"], float) and state["scale"] == 1:
            return inverses[0] @ V, state
        return Kronecker(*inverses, scale=state["scale"]) @ V, state


def _remembers(F: Operator) -> bool:
    return isinstance(F.operator if isinstance(F, Shifted) else F, SecantMemory)


def _inverse_of(factor: State) -> Operator:
    """The inverse that the state of a factor holds."""
    if "packed" in factor:
        return unpack(factor["packed"])
    return Dense(factor["inverse"]) if "inverse" in factor else Diagonal(factor["diagonal"])


def _none(s: Tensor) -> Tensor:
    """No pair yet, for each vector of a stack."""
    return torch.zeros(s.shape[:-1], dtype=torch.int64, device=s.device)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _reciprocal(values: Tensor) -> Tensor:
    if not bool((values > 0).all()):
        raise SolverFailure("the bfgs solver found an entry of a diagonal that is not positive: increase the damping.")
    return values.reciprocal()
