"""The Hessian of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from precond.matrices.base import REGISTRY, Matrix


@REGISTRY.register("hessian")
@dataclass(frozen=True, kw_only=True)
class Hessian(Matrix):
    """Hessian: the second derivative of the loss as given. Indefinite away from a minimum.

    Taken by replay at the step, two backward passes a product; a dense block takes one product a parameter (batched),
    so dense representations are for small models. Sources: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    >>> Hessian().definite
    False
    """

    supplies = ("product",)
    definite = False
    needs = "the criterion itself, twice differentiable; second-order passes by replay"

    @property
    def second_order(self) -> bool:
        return True
