"""What a representation declares about each entry that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from precond.truncation import Truncation

Kind = Literal["mean", "rows", "state", "local"]
Form = Literal["matrix", "diagonal", "plain"]
Statistics = dict[str, Any]
"""A flat dict of tensors; local entries may be anything that lives one step."""
GRAM = ".gram"
"""Suffix of the Gram matrix that lies beside an entry of rows."""


@dataclass(frozen=True)
class Stat:
    """One entry of the statistics.

    Args:
        kind: "mean", averaged; "rows", concatenated along the first dimension, over steps and ranks alike: U with
            C = U^T U; "state", replaced by each valid observation, for what is no average (a BFGS matrix is made from the one before); "local", lives one step.
        degree: how the entry scales with the loss: times c^degree when the loss is multiplied by c; rows by c^(degree / 2).
        form: "matrix" (*batch, n, n) and "diagonal" (*batch, n) say where a multiple of the identity may be added; "plain" has none.
        gram: of rows (n, *batch, p): a history that concatenates them keeps their Gram matrix (*batch, n, n) beside them, NAME + GRAM, and
            computes the products of new rows only.
        truncation: of rows (n, *batch, p): how a history that averages keeps their number bounded; it refuses rows without.
        whole: made of what is already summed over parts and ranks, with their weights: neither reduced nor scaled again.

    >>> Stat("mean", form="matrix").degree
    1.0
    """

    kind: Kind
    degree: float = 1.0
    form: Form = "plain"
    gram: bool = False
    truncation: Truncation | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"the kind of a statistic is one of {', '.join(get_args(Kind))}, not {self.kind!r}.")
        if self.form not in get_args(Form):
            raise ValueError(f"the form of a statistic is one of {', '.join(get_args(Form))}, not {self.form!r}.")

    def scale(self, amount: Tensor) -> Tensor:
        """What the entry is multiplied by where C is multiplied by `amount`, 0-dim."""
        return amount ** (self.degree / 2 if self.kind == "rows" else self.degree)
