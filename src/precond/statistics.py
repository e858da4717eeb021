"""What a representation declares about each entry that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["mean", "rows", "state", "local"]
Form = Literal["matrix", "diagonal", "plain"]
Statistics = dict[str, Any]
"""A flat dict of tensors; local entries may be anything that lives one step."""


@dataclass(frozen=True)
class Stat:
    """One entry of the statistics.

    Args:
        kind: "mean", averaged; "rows", concatenated along the first dimension; "state", replaced by each valid observation, for
            what is no average (a BFGS matrix is made from the one before); "local", lives one step.
        degree: how the entry scales with the loss: times c^degree when the loss is multiplied by c.
        form: "matrix" (*batch, n, n) and "diagonal" (*batch, n) say where a multiple of the identity may be added; "plain" has none.

    >>> Stat("mean", form="matrix").degree
    1.0
    """

    kind: Kind
    degree: float = 1.0
    form: Form = "plain"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"the kind of a statistic is one of {', '.join(get_args(Kind))}, not {self.kind!r}.")
        if self.form not in get_args(Form):
            raise ValueError(f"the form of a statistic is one of {', '.join(get_args(Form))}, not {self.form!r}.")
