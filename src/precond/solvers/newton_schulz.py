"""Newton and Newton-Schulz iterations for inverse roots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

from torch import Tensor

from precond.damping import Damping, Factored, Tikhonov
from precond.errors import InvalidCombination, SolverFailure
from precond.numerics import symmetric_product
from precond.operators import Dense, Diagonal, Kronecker, Operator, Shifted, pack, unpack
from precond.operators.base import number
from precond.operators.kronecker import matrices
from precond.solvers.base import REGISTRY, Solver, State
from precond.solvers.inverse_roots import MUON, Coefficients, coupled_newton, newton_inverse, quintic

Roots = dict[str, Tensor]


@REGISTRY.register("newton_schulz")
@dataclass(frozen=True, kw_only=True)
class NewtonSchulz(Solver):
    """damped^(-power) by products alone, for powers 1/q: no factorisation, so it is fast where products are.

    By default the coupled Newton iteration to `tolerance`, (q + 1) products an iteration and about log(condition number) of them;
    for q = 1 it starts from the last inverse where that is close enough: one product to measure it, 1.6 more an iteration, and the last
    iteration is left to the application, of 4 n^2 then, where the matrix is alone. Kronecker operators factor by factor: F^exponent to the power
    -power needs the root 1 / (exponent power), as Shampoo's 2 k.

    With `coefficients`, a fixed number of steps of X <- a X + b X X^T X + c (X X^T)^2 X on the square-root scale, q = 2: of C = G G^T,
    applied to G, it is Muon's approximate polar factor; the default iteration gives the exact one, (G G^T)^(-1/2) G = U V^T, where
    C has full rank or damping. That C is `batched_empirical_fisher` x `kron_dim` on one side, `KronDim(merge_dims="rest", modes="shortest")`.

    Args:
        power: 1/q.
        max_iterations: of the Newton iteration, which fails beyond.
        tolerance: of the largest entry of M - I = A X^q - I: the relative error of the result is about this over q. From the last inverse,
            |A^(1/2) X A^(1/2) - I| <= tolerance |I| in Frobenius norms.
        coefficients: (a, b, c), "muon" for the published ones, None for the Newton iteration.
        steps: of the polynomial.

    State: the inverse, "roots" of the factors that a next refresh may start from, "iterations" of the last, "rest" R: applied is X + X R.

    Raises:
        InvalidCombination: 1 / (exponent power) is no whole number, or not 2 with `coefficients`.
        SolverFailure: a matrix is singular, indefinite or not finite to working precision.

    Sources: Guo and Higham 2006; Anil et al. (arXiv 2002.09018); Jordan et al., "Muon", 2024.

    >>> import torch
    >>> solver = NewtonSchulz(power=0.5)
    >>> state = solver.init(Dense(torch.diag(torch.tensor([3.0, 8.0]))), Tikhonov(1.0))
    >>> solver.apply(state, torch.ones(2))[0]
    tensor([0.5000, 0.3333])
    """

    accepts: ClassVar[frozenset[type[Operator]]] = frozenset({Dense, Kronecker})
    needs_definite: ClassVar[bool] = True

    power: float = 1.0
    max_iterations: int = 100
    tolerance: float = 1e-6
    coefficients: Literal["muon"] | Coefficients | None = None
    steps: int = 5

    def __post_init__(self) -> None:
        if not self.power > 0 or not _is_whole(1 / self.power):
            raise ValueError(f"the power of the newton_schulz solver is 1/q with a whole q, such as 0.5, not {self.power}.")
        if self.max_iterations < 1 or not self.tolerance > 0 or self.steps < 1:
            raise ValueError(
                f"newton_schulz needs max_iterations >= 1, tolerance > 0 and steps >= 1, not {self.max_iterations}, {self.tolerance}, {self.steps}."
            )
        if self.coefficients not in (None, "muon") and (isinstance(self.coefficients, str) or len(self.coefficients) != 3):
            raise ValueError(f"coefficients are 'muon', three numbers or None, not {self.coefficients!r}.")

    def natural_damping(self, structure: type[Operator]) -> type[Damping]:
        return Factored if issubclass(structure, Kronecker) else Tikhonov

    def _refresh(self, state: State, operator: Operator, damping: Damping) -> State:
        damped = self.damped(operator, damping)
        if isinstance(damped, Shifted) and isinstance(damped.operator, Dense):
            damped = damped.operator.plus(damped.shift)
        if not isinstance(damped, (Dense, Kronecker)):
            self.refuse(
                damped, "use Tikhonov damping of a dense, Factored damping of a Kronecker operator, or the 'eigen' solver, which takes any"
            )
        factors = (damped,) if isinstance(damped, Dense) else tuple(map(matrices, damped.factors))
        root = self._root(1.0 if isinstance(damped, Dense) else damped.exponent)
        old: Roots = state.get("roots", {})
        done = [self._factor(matrices(F), root, old.get(str(m))) for m, F in enumerate(factors)]
        rest: Roots = {}
        if isinstance(damped, Dense):
            found = [F for F, _, _ in done]
            inverse: Operator = found[0]
            rest = {str(m): R for m, (_, R, _) in enumerate(done) if R is not None}
        else:
            found = [F if R is None or isinstance(F, Diagonal) else Dense(F.matrix + symmetric_product(F.matrix, R)) for F, R, _ in done]
            scale = number(damped.scale, damped).pow(-self.power)
            if not bool(scale.isfinite().all()):
                self._fail("a scale of", damped.scale)
            inverse = Kronecker(*found, scale=scale)
        roots = {str(m): F.matrix for m, F in enumerate(found) if isinstance(F, Dense)} if root == 1 else {}
        return {"inverse": pack(inverse), "roots": roots, "rest": rest, "iterations": max(k for _, _, k in done)}

    def _root(self, exponent: float) -> int:
        root = 1 / (exponent * self.power)
        if not _is_whole(root) or (self.coefficients is not None and round(root) != 2):
            needed = "2, with coefficients" if self.coefficients is not None else "a whole number"
            raise InvalidCombination(
                f"the newton_schulz solver needs 1 / (exponent power) to be {needed}, not {root:.3g}, with factors of exponent {exponent:.3g} and "
                f"power {self.power:g}: change the power, or use 'eigen'."
            )
        return round(root)

    def _factor(self, F: Dense | Diagonal, root: int, old: Tensor | None) -> tuple[Dense | Diagonal, Tensor | None, int]:
        """X of F^(-1 / root) = X, or = X + X R with an R, and the iterations."""
        if isinstance(F, Diagonal):
            values = F.values.pow(-1 / root)
            if not bool((values.isfinite() & (values > 0)).all()):
                self._fail("a diagonal factor of shape", tuple(F.values.shape))
            return Diagonal(values), None, 0
        if self.coefficients is not None:
            return Dense(quintic(F.matrix, MUON if self.coefficients == "muon" else self.coefficients, self.steps)), None, self.steps
        if old is not None and old.shape == F.matrix.shape:
            warm = newton_inverse(F.matrix, old.to(F.matrix), self.max_iterations, self.tolerance)
            if warm is not None:
                X, R, iterations = warm
                return Dense(X), R, iterations
        X, iterations = coupled_newton(F.matrix, root, self.max_iterations, self.tolerance)
        return Dense(X), None, iterations

    def _fail(self, what: str, value: object) -> NoReturn:
        raise SolverFailure(
            f"the newton_schulz solver found {what} {value} not positive and finite: increase the damping, which must be positive."
        )

    def _apply(self, state: State, V: Tensor, operator: Operator | None) -> tuple[Tensor, State]:
        inverse, R = unpack(state["inverse"]), state["rest"].get("0")
        return inverse @ (V if R is None else V + Dense(R) @ V), state


def _is_whole(x: float) -> bool:
    return x >= 0.5 and abs(x - round(x)) < 1e-9 * x
