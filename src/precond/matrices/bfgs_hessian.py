"""The BFGS approximation of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from precond.matrices.base import REGISTRY, Matrix
from precond.observe import Context, Kind
from precond.operators import Operator, Secant, SecantKronecker
from precond.secant import PairRule, Second, Side

Pairs = Literal["replay", "products", "gradients"]


@REGISTRY.register("bfgs_hessian")
@dataclass(frozen=True, kw_only=True)
class BFGSHessian(Matrix):
    """BFGS Hessian: the matrix that starts as I and is made to satisfy B s = y by one pair after another.

    Where the pairs come from, s = theta_{t+1} - theta_t in all three:

    - "replay": y is the change of the gradient of one batch; the batch is run again after the optimizer's update, one more
      forward and backward pass. Under `kron_io` the pair is per layer and in the space of its outputs (K-BFGS): s the change
      of the mean output, y of the mean gradient there; A stays the second moment of the inputs.
    - "products": y = H s, H the Hessian of the batch at the new parameters; three more passes.
    - "gradients": y is the difference of successive gradients, of different batches; no more passes, and noise in y.

    Scale: that of the loss as given. powell, powell_on, second, amount, skip, scale_initial, decay: see `precond.secant.PairRule`. B itself
    is damped by Powell's rule for B, or with powell_on="inverse" by that for its inverse, as the solver `bfgs` damps the inverse that it follows.
    It has no value from one batch: `precond.curvature` takes `pairs=`. Sources: Broyden, Fletcher, Goldfarb and Shanno,
    1970; Powell, "Algorithms for nonlinear constraints that use Lagrangian functions", 1978; Goldfarb, Ren and Bahamou,
    "Practical quasi-Newton methods for training deep neural networks" (K-BFGS), 2020.

    >>> BFGSHessian(pairs="gradients").supplies
    ('successive',)
    """

    needs = "the optimizer's update, and the batch once more after it by replay (pairs='replay')"

    pairs: Pairs = "replay"
    powell: float = 0.2
    powell_on: Side = "matrix"
    second: Second = "none"
    amount: float = 0.0
    skip: float = 1e-8
    scale_initial: bool = False
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.pairs not in get_args(Pairs):
            raise ValueError(f"BFGSHessian(pairs={self.pairs!r}): choose one of {', '.join(map(repr, get_args(Pairs)))}.")
        _ = self.rule  # refuses what has no meaning

    @property
    def supplies(self) -> tuple[Kind, ...]:
        return {"replay": ("secant", "layer_secant"), "products": ("secant",), "gradients": ("successive",)}[self.pairs]  # type: ignore[return-value]

    @property
    def needs_trajectory(self) -> bool:
        return True

    @property
    def second_order(self) -> bool:
        return self.pairs == "products"

    def finish(self, operator: Operator) -> Operator:
        """The rule for its pairs goes with them."""
        if isinstance(operator, Secant):
            return self._ruled(operator)
        if isinstance(operator, SecantKronecker):
            return SecantKronecker(*(self._ruled(F) if isinstance(F, Secant) else F for F in operator.factors))
        return operator

    def _ruled(self, B: Secant) -> Secant:
        return Secant(B.matrix, B.s, B.y, self.rule)

    def cotangents(self, context: Context) -> Tensor:
        return context.likelihood.gradient(context.output, context.target).unsqueeze(0)

    @property
    def rule(self) -> PairRule:
        """How its pairs are damped."""
        return PairRule(
            powell=self.powell, powell_on=self.powell_on, second=self.second, amount=self.amount, skip=self.skip,
            scale_initial=self.scale_initial, decay=self.decay,
        )  # fmt: skip
