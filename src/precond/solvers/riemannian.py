"""Inverse-free natural-gradient updates of the roots of Kronecker factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping, PerFactor, Tikhonov
from precond.operators import Dense, Diagonal, Kronecker, Operator, Shifted, mode_products
from precond.solvers.base import REGISTRY, Solver, State

Group = Literal["dense", "diagonal", "block", "lower", "upper"]
Method = Literal["ingd", "ikfac"]


@REGISTRY.register("riemannian")
@dataclass(frozen=True, kw_only=True)
class Riemannian(Solver):
    """K_m K_m^T for the inverse of each factor F_m, by K_m <- K_m (I - step M_m): products of matrices only, so that half precision will do.

    With H_m = K_m^T F_m K_m, h_m = tr H_m / n_m and k_m = tr K_m^T K_m / n_m, each refresh moves all factors from the old ones by
    M_m <- momentum M_m + (1/2) [ prod_{j != m} h_j H_m + damping prod_{j != m} k_j K_m^T K_m - I ],
    which rests where those brackets vanish ("ingd"; with structured groups, SINGD). "ikfac": M_m = (1/2) [H_m - I] of the damped factor,
    without momentum and traces: (K K^T)^-1 <- (1 - step) (K K^T)^-1 + step (F + damping I) + O(step^2), so that it follows the
    running average of K-FAC with weight 1 - step of the old value, and rests where K K^T = (F + damping I)^-1.

    Args:
        method: "ingd" or "ikfac".
        group: where K_m lives, and onto whose Lie algebra M_m is projected: "dense"; "diagonal"; "block", diagonal blocks of `block` rows;
            "lower" or "upper", triangular. One for all, or one a factor in the order of the operator's factors. A diagonal factor has a
            diagonal K.
        step: of the truncated exponential. momentum: alpha_1, 0 for "ikfac".
        normalise: divide the step by the largest entry of M_m where that exceeds 1, and weigh what is new in M_m by 1 - momentum.
        initial: K starts as initial times I. block: rows of a block.

    A step that is not normalised is bounded where the truncated exponential ends: where step M_m has an entry above 1, as after a spike or
    from a start far above the inverse, M_m is shortened so that the largest eigenvalues of K K^T shrink and none grows or changes its sign.

    Damping: a number is the damping above of "ingd", which keeps the sum F_1 (x) ... (x) F_k + damping I apart, and that of each factor
    (`PerFactor`) of "ikfac". It averages in its own state, and starts far from the inverse unless K K^T is near it. Cost 3 n_m^3 a factor and
    refresh, dense; applied, 2 n n_m.

    Sources: Lin et al., "Simplifying momentum-based positive-definite submanifold optimization" (INGD), 2023, arXiv 2302.09738; Lin et al.,
    "Structured inverse-free natural gradient descent" (SINGD, IKFAC), 2024, arXiv 2312.05705.

    >>> solver, state = Riemannian(method="ikfac", step=0.5), {}
    >>> for _ in range(100):
    ...     state = solver.refresh(state, Kronecker(torch.tensor([1.0]), torch.tensor([3.0])), PerFactor(1.0))
    >>> solver.apply(state, torch.ones(1))[0]
    tensor([0.1250])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({Kronecker, Dense, Diagonal})
    averages: ClassVar[bool] = True
    half: ClassVar[bool] = True

    method: Method = "ingd"
    group: Group | tuple[Group, ...] = "dense"
    step: float = 1e-2
    momentum: float = 0.5
    normalise: bool = False
    initial: float = 1.0
    block: int = 30

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"Riemannian(method={self.method!r}): choose 'ingd' or 'ikfac'.")
        groups = tuple(self.group) if isinstance(self.group, (tuple, list)) else (self.group,)
        if not groups or not all(group in get_args(Group) for group in groups):
            raise ValueError(f"Riemannian(group={self.group!r}): choose one of {', '.join(map(repr, get_args(Group)))}, or one for each factor.")
        if isinstance(self.group, list):  # as a recipe has it
            object.__setattr__(self, "group", groups)
        if not 0 < self.step < 2 or not 0 <= self.momentum < 1:
            raise ValueError(f"Riemannian(step={self.step}, momentum={self.momentum}): the step lies in (0, 2), the momentum in [0, 1).")
        if not 0 < self.initial < math.inf or self.block < 1:
            raise ValueError(f"Riemannian(initial={self.initial}, block={self.block}): both are positive.")

    def remark(self) -> str | None:
        words = {"block": f"in blocks of {self.block}", "lower": "lower triangular", "upper": "upper triangular"}
        groups = self.group if isinstance(self.group, tuple) else (self.group,)
        said = ", ".join(words.get(group, group) for group in groups)
        return None if set(groups) == {"dense"} else f"roots of the inverse factors {said}"

    def natural_damping(self, structure: type[Operator]) -> type[Damping]:
        return PerFactor if self.method == "ikfac" and issubclass(structure, Kronecker) else Tikhonov

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        damped = self.damped(operator, damping)
        inner, shift = (damped.operator, damped.shift) if isinstance(damped, Shifted) else (damped, 0.0)
        if self.method == "ikfac" and inner is not damped:
            self.refuse(damped, "ikfac damps each factor by itself; use PerFactor or Factored damping")
        if isinstance(inner, Kronecker):
            inner = inner.materialise()
            factors, scale = inner.factors, inner.scale
        else:
            factors, scale = (inner,), 1.0
        if not all(isinstance(F, (Dense, Diagonal)) for F in factors):
            self.refuse(damped, "its factors must be dense or diagonal, with damping that leaves them so, such as Tikhonov or PerFactor")
        moments = [_stack(F) for F in factors]
        groups = self._groups(moments)
        old = state.get("factors") or {str(m): self._start(F, group) for m, (F, group) in enumerate(zip(moments, groups, strict=True))}
        roots = [old[str(m)]["K"].to(F) for m, F in enumerate(moments)]
        weight = torch.as_tensor(scale, dtype=moments[0].dtype, device=moments[0].device)
        made = self._moved(roots, moments, groups, shift, weight, [old[str(m)]["M"].to(F) for m, F in enumerate(moments)])
        ikfac = {"scale": 1 / weight} if self.method == "ikfac" else {}  # ingd has it in its traces
        return {"factors": {str(m): {"K": K, "M": M} for m, (K, M) in enumerate(made)}, "sizes": _sizes(moments)} | ikfac

    def _groups(self, moments: list[Tensor]) -> list[Group]:
        chosen = self.group if isinstance(self.group, tuple) else (self.group,) * len(moments)
        if len(chosen) != len(moments):
            raise ValueError(f"Riemannian(group={self.group!r}) names {len(chosen)} groups for an operator of {len(moments)} factors.")
        return ["diagonal" if F.dim() == 2 else group for F, group in zip(moments, chosen, strict=True)]

    def _start(self, F: Tensor, group: Group) -> State:
        ones = self.initial * torch.ones(F.shape[:2], dtype=F.dtype, device=F.device)
        K = ones if group == "diagonal" else torch.diag_embed(ones)
        return {"K": K, "M": torch.zeros_like(K)}

    def _moved(
        self, roots: list[Tensor], moments: list[Tensor], groups: list[Group], shift: float | Tensor, scale: Tensor, old: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """(K, M) of every factor after a step from the old ones."""
        H = [_conjugated(F, K) for F, K in zip(moments, roots, strict=True)]
        squares = [K.square() if K.dim() == 2 else K.mT @ K for K in roots]
        h, k = (torch.stack([_mean_eigenvalue(X) for X in stack]) for stack in (H, squares))
        made = []
        for m, (K, group) in enumerate(zip(roots, groups, strict=True)):
            momentum = 0.0
            if self.method == "ikfac":
                bracket = H[m]
            else:
                momentum = self.momentum
                others = [j for j in range(len(roots)) if j != m]
                level = _spread(scale * h[others].prod(0), H[m]) * H[m]
                bracket = level + _spread(shift * k[others].prod(0), squares[m]) * squares[m]
            fresh = _project((bracket - _identity(bracket)) / 2, group, self.block) * (1 - momentum if self.normalise else 1)
            M = momentum * old[m] + fresh
            M = M if self.normalise else _bounded(M, self.step)
            step = self.step / M.abs().flatten(1).amax(-1).clamp(min=1) if self.normalise else M.new_full(M.shape[:1], self.step)
            made.append((K - _spread(step, K) * (K * M if K.dim() == 2 else K @ M), M))
        return made

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        roots = [factor["K"] for factor in state["factors"].values()]
        X = mode_products(roots, mode_products(roots, V.reshape(*state["sizes"], -1), transpose=True))
        if "scale" in state:
            X = _spread(state["scale"].expand(X.shape[0]), X) * X
        return X.reshape(V.shape), state


def _bounded(M: Tensor, step: float) -> Tensor:
    """M of each matrix of a stack, made smaller where step M has an entry above 1: of Frobenius norm 1/2 then."""
    wild = step * M.abs().flatten(1).amax(-1) > 1
    size = step * M.flatten(1).norm(dim=1)
    return M * _spread(torch.where(wild, 0.5 / torch.where(wild, size, 1.0), 1.0), M)


def _stack(F: Operator) -> Tensor:
    """(b, n, n), or (b, n) of a diagonal."""
    assert isinstance(F, (Dense, Diagonal))
    return F.values.reshape(-1, F.size) if isinstance(F, Diagonal) else F.matrix.reshape(-1, F.size, F.size)


def _sizes(moments: list[Tensor]) -> tuple[int, ...]:
    return (moments[0].shape[0], *(F.shape[1] for F in moments))


def _spread(x: Tensor, like: Tensor) -> Tensor:
    """One number a matrix of a stack, as it multiplies them."""
    return x.reshape(-1, *[1] * (like.dim() - 1))


def _conjugated(F: Tensor, K: Tensor) -> Tensor:
    """K^T F K; its diagonal where K is diagonal."""
    if K.dim() == 2:
        return K.square() * (F if F.dim() == 2 else F.diagonal(dim1=-2, dim2=-1))
    return K.mT @ F @ K


def _mean_eigenvalue(X: Tensor) -> Tensor:
    return (X if X.dim() == 2 else X.diagonal(dim1=-2, dim2=-1)).mean(-1)


def _identity(like: Tensor) -> Tensor:
    return torch.ones_like(like) if like.dim() == 2 else torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _project(M: Tensor, group: Group, block: int) -> Tensor:
    """Onto the Lie algebra of a group: symmetric M (b, n, n), or its diagonal (b, n)."""
    if group in ("lower", "upper"):  # what is dropped on one side is counted on the other, as in the inner product of symmetric matrices
        return M.tril() + M.tril(-1) if group == "lower" else M.triu() + M.triu(1)
    if group == "block":
        number = torch.arange(M.shape[-1], device=M.device) // block
        return M * (number.unsqueeze(1) == number)
    return M
