"""The Sherman-Morrison-Woodbury formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.damping import Damping, Factored
from precond.errors import SolverFailure, UsageError
from precond.numerics import ROUNDING
from precond.operators import Gram, Kronecker, LowRank, LowRankEigen, Operator, RootShifted, RowForm, Shifted, pack, unpack
from precond.operators.base import inverse_power, number
from precond.operators.modes import mode_product
from precond.operators.shifted import spread
from precond.solvers.base import REGISTRY, Solver, State
from precond.solvers.cholesky import Cholesky

Complement = Literal["damped", "zero"]


@REGISTRY.register("smw")
@dataclass(frozen=True, kw_only=True)
class SMW(Solver):
    """damped^(-power) of C = U^T W U on the side of its r rows.

    Power 1 with C + l I and W = S^2: (1/l) (I - U^T S (l I + S U U^T S)^-1 S U), by a Cholesky factorisation of an r x r matrix. Any other
    power or damping f: f(0) I + V (f(D) - f(0)) V^T from the eigendecomposition C = V D V^T on the Gram side, such as
    (1/e) I + V ((D^(1/2) + e)^-1 - 1/e) V^T for `Outside` damping and power 1/2. Refresh: the Gram matrix, and r^3 / 3 or 10 r^3; apply two
    products with U and r^2. Sources: Woodbury 1950; Ren and Goldfarb 2019 (arXiv 1906.02353); Agarwal et al. 2019 (GGT, arXiv 1806.02958).

    A Kronecker operator is inverted factor by factor, for power 1 and factor-wise damping: those held by their rows as above, the others by
    Cholesky (SKFAC, Tang et al. 2021).

    What is applied to directions in the row space is a difference that loses log10(D / l) digits. Where that leaves none, all of it is
    computed in float64.

    Args:
        power: p > 0.
        complement: what becomes of directions orthogonal to the rows: "damped" like the rest, so that the damping must be positive; or
            "zero", the pseudo-inverse, which may do without damping, as in the released code of GGT.
        tolerance: eigenvalues of C up to this multiple of the largest, of a stack in each matrix, count as zero, beside those within
            rounding of it.
        threshold: eigenvalues of C up to this one count as zero. Either of the two, and the pseudo-inverse, take negative ones as zero.
        promote: use float64 where the damping is below this multiple of the largest diagonal entry of the (weighted) Gram matrix.

    Raises:
        SolverFailure: the damped operator is singular, indefinite or not finite.

    >>> from precond.damping import Tikhonov
    >>> solver = SMW()
    >>> state = solver.init(LowRank(torch.tensor([[1.0, 1.0]])), Tikhonov(1.0))
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([0.3333, 0.3333])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({LowRank, Gram, Kronecker})

    power: float = 1.0
    complement: Complement = "damped"
    tolerance: float = 0.0
    threshold: float = 0.0
    promote: float = 1e-6

    def __post_init__(self) -> None:
        if not math.isfinite(self.power) or self.power <= 0:
            raise ValueError(f"the power of the smw solver is positive and finite, not {self.power}: it applies the inverse power.")
        if self.complement not in get_args(Complement):
            raise ValueError(f"complement is one of {', '.join(get_args(Complement))}, not {self.complement!r}.")
        if not all(option >= 0 for option in (self.tolerance, self.threshold, self.promote)):
            raise ValueError(
                f"smw needs tolerance, threshold and promote of at least 0, not {self.tolerance}, {self.threshold} and {self.promote}."
            )

    def natural_damping(self, structure: type[Operator]) -> type[Damping]:
        return Factored if issubclass(structure, Kronecker) else super().natural_damping(structure)

    @property
    def _cuts(self) -> bool:
        return self.complement == "zero" or self.tolerance > 0 or self.threshold > 0

    def damped(self, operator: Operator, damping: Damping) -> Operator:
        if not self._cuts or isinstance(operator, Kronecker):
            return damping(operator, self.power)
        eigen = _eigen(operator)
        kept = eigen.values > torch.clamp(self.tolerance * eigen.values.amax(-1, keepdim=True), min=self.threshold)
        eigen = LowRankEigen(eigen.rows, eigen.vectors, torch.where(kept, eigen.values, eigen.rest), eigen.rest)
        damped = _eigen(damping(eigen, self.power))
        if self.complement == "damped":
            return damped
        rest = torch.zeros_like(damped.rest)
        return LowRankEigen(damped.rows, damped.vectors, torch.where(kept, damped.values, rest), rest)

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        damped = self.damped(operator, damping)
        if isinstance(damped, Kronecker) and self.power == 1 and not self._cuts:
            return self._invert_factors(damped.materialise())
        if isinstance(_inner(operator), Kronecker):
            self.refuse(damped, "it inverts factor by factor: use Factored damping, power 1 and no cut; or the 'eigen' solver")
        return self._by_rows(_rows(operator), damped, lambda: self.damped(_widen(operator), damping))

    def _invert_factors(self, damped: Kronecker) -> State:
        """Of every factor the state of its own inversion, or its inverse."""
        factors = {}
        for m, F in enumerate(damped.factors):
            rows = F.operator if isinstance(F, Shifted) else F
            if isinstance(rows, RowForm):
                factors[str(m)] = self._by_rows(rows, F, partial(_widen, F))
            else:
                factors[str(m)] = {"inverse": pack(Cholesky().inverse(F))}
        scale = number(damped.scale, damped).reciprocal()
        if not bool(scale.isfinite().all()):
            self._fail(damped)
        return {"factors": factors, "scale": scale, "batch": damped.batch.numel(), "sizes": {str(m): n for m, n in enumerate(damped.sizes)}}

    def _by_rows(self, rows: RowForm, damped: Operator, widened: Callable[[], Operator]) -> State:
        diagonal = rows.weigh(rows.gram).diagonal(dim1=-2, dim2=-1)
        if rows.dtype != torch.float64 and bool(self._smallest(rows, damped) < self.promote * diagonal.abs().max()):
            damped = widened()
        can_factorise = self.power == 1 and isinstance(damped, Shifted) and isinstance(damped.operator, RowForm)
        root = _rows(damped).root_weights() if can_factorise else None
        found = self._invert(damped) if root is None else self._factorise(damped, root)
        return {"rows": pack(rows.unweighted())} | found

    def _smallest(self, rows: RowForm, damped: Operator) -> Tensor:
        """The eigenvalue of the damped operator where C has none, or the smallest that the pseudo-inverse keeps."""
        if isinstance(damped, LowRankEigen):
            values = damped.spectrum
            return torch.where(values > 0, values, torch.full_like(values, torch.inf)).amin()
        if isinstance(damped, RootShifted):
            return number(damped.shift, rows).pow(1 / damped.power)
        return number(damped.shift if isinstance(damped, Shifted) else 0.0, rows).amin()

    def _factorise(self, damped: Operator, root: Tensor) -> State:
        assert isinstance(damped, Shifted) and isinstance(damped.operator, RowForm)
        shift = number(damped.shift, damped)
        inner = damped.operator.gram * root.unsqueeze(-1) * root.unsqueeze(-2)
        inner.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        L, info = torch.linalg.cholesky_ex(inner)
        pivots = torch.where(info[..., None] == 0, L.diagonal(dim1=-2, dim2=-1).square(), -1.0)
        noise = ROUNDING * torch.finfo(pivots.dtype).eps * inner.diagonal(dim1=-2, dim2=-1)
        if not bool((shift > 0).all() & (pivots > noise).all()):
            self._fail(damped)
        return {"factor": L, "root": root, "shift": shift}

    def _invert(self, damped: Operator) -> State:
        eigen = _eigen(damped)
        inverse = eigen.map(lambda s: inverse_power(s, self.power) if self.complement == "zero" else s.pow(-self.power))
        if not bool(inverse.spectrum.isfinite().all()):
            self._fail(damped)
        return {"vectors": inverse.vectors, "values": inverse.values, "rest": inverse.rest}

    def _fail(self, damped: Operator) -> None:
        raise SolverFailure(
            f"the smw solver found a {damped.kind} operator of shape {tuple(damped.shape)} singular, not finite, or indefinite with power "
            f"{self.power}: damping must be positive; or choose complement='zero', the pseudo-inverse."
        )

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        if "factors" in state:
            return self._apply_factors(state, V), state
        rows, wide = _kept_rows(state)
        X = V.to(wide)
        if "factor" in state:
            root, shift = state["root"].unsqueeze(-1), state["shift"]
            inside = root * torch.cholesky_solve(root * rows.left(X), state["factor"]) / shift[..., None, None]
            divisor = spread(shift, rows.size)
            assert isinstance(divisor, Tensor)
            result = rows.right(inside.neg_()).addcdiv_(X, divisor)  # one pass: vectors are as long as the parameters
        else:
            result = LowRankEigen(rows, state["vectors"], state["values"], state["rest"]) @ X
        return result.to(V.dtype), state

    def _apply_factors(self, state: State, V: Tensor) -> Tensor:
        X = V.reshape(state["batch"], *state["sizes"].values(), V.shape[1])
        for m, inner in enumerate(state["factors"].values()):
            X = mode_product(unpack(inner["inverse"])._matmul if "inverse" in inner else partial(self._apply_to, inner), X, m + 1)
        scale: Tensor = state["scale"]
        return (X.reshape(state["batch"], -1) * scale.reshape(-1, 1)).reshape(V.shape)

    def _apply_to(self, state: State, V: Tensor) -> Tensor:
        return self._apply(state, V, None)[0]

    def apply_to_rows(self, state: State, c: Tensor) -> Tensor:
        """(C + l I)^-1 U^T S c for `c` (*batch, r), without the cancellation: U^T S (l I + S U U^T S)^-1 c, one product with U^T.

        A mean gradient is such a vector, with c of constants (push-through identity; TONGA, Le Roux et al. 2007). For power 1 and
        Tikhonov damping.
        """
        if "factor" not in state:
            raise UsageError("apply_to_rows needs a state of the smw solver with power 1 and Tikhonov damping: use apply.")
        rows, wide = _kept_rows(state)
        solved = torch.cholesky_solve(c.to(wide).unsqueeze(-1), state["factor"])
        return rows.right((state["root"].unsqueeze(-1) * solved).squeeze(-1)).to(c.dtype)


def _kept_rows(state: State) -> tuple[RowForm, torch.dtype]:
    """The rows in the dtype in which the state was computed, and that dtype."""
    rows = unpack(state["rows"])
    assert isinstance(rows, RowForm)
    wide: torch.dtype = state["factor" if "factor" in state else "values"].dtype
    if wide != rows.dtype:
        cast = rows.to(wide)
        assert isinstance(cast, RowForm)
        rows = cast
    return rows, wide


def _inner(operator: Operator) -> Operator:
    while isinstance(operator, (Shifted, RootShifted)):
        operator = operator.operator
    return operator


def _rows(operator: Operator) -> RowForm:
    rows = _inner(operator)
    assert isinstance(rows, RowForm)
    return rows


def _widen(operator: Operator) -> Operator:
    """In float64, with a Gram matrix that has its accuracy."""
    if isinstance(operator, RowForm):
        cast = operator.to(torch.float64)
        assert isinstance(cast, RowForm)
        return cast.afresh()
    return type(operator).from_fields(operator.fields() | {"operator": _widen(operator.fields()["operator"])})


def _eigen(operator: Operator) -> LowRankEigen:
    eigen = operator.spectral()
    assert isinstance(eigen, LowRankEigen)
    return eigen
