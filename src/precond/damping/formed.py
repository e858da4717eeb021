"""Dampings that choose an amount and leave its form to another one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from precond.damping.base import Amount, Damping
from precond.damping.factored import Factored
from precond.damping.outside import Outside
from precond.damping.per_factor import PerFactor
from precond.damping.tikhonov import Tikhonov

FORMS: tuple[type[Damping], ...] = (Tikhonov, Outside, Factored, PerFactor)
NATURAL = "natural"


@dataclass(frozen=True)
class Formed(Damping):
    """An amount that is chosen by some rule, in the form of another damping.

    Args:
        form: the name of a class such as "Tikhonov", "Outside", "Factored" or "PerFactor". "natural": that of the cell, as for a number; without
            a cell, Tikhonov.
    """

    form: str = NATURAL

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = Damping.kinds.get(self.form)
        if self.form != NATURAL and (kind is None or issubclass(kind, Formed)):
            known = ", ".join(repr(form.__name__) for form in FORMS)
            raise ValueError(f"{type(self).__name__}(form={self.form!r}): choose {NATURAL!r} or one of {known}.")

    def shaped(self, amount: Amount) -> Damping:
        """This amount in its form."""
        return (Tikhonov if self.form == NATURAL else Damping.kinds[self.form])(amount)

    @property
    def keeps_eigenvectors(self) -> bool:
        return self.shaped(0.0).keeps_eigenvectors

    def plain(self) -> Damping:
        return replace(self, form=NATURAL)

    def resolved(self, natural: type[Damping]) -> Self:
        return replace(self, form=natural.__name__) if self.form == NATURAL else self
