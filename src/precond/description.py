"""What `describe()` prints: every trainable parameter, its block, its triple, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from precond.blockstate import BlockState
from precond.damping import Damping
from precond.plan import Plan


@dataclass(frozen=True)
class Row:
    """One trainable parameter."""

    parameter: str
    shape: tuple[int, ...]
    block: str
    triple: str
    damping: str
    note: str
    bytes: int


@dataclass(frozen=True)
class Description:
    """A table of all trainable parameters; `str()` aligns it."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "block", "matrix x repr x solver", "damping", "bytes", "note")
        body = [
            (r.parameter, "x".join(map(str, r.shape)) or "scalar", r.block, r.triple, r.damping, str(r.bytes) if r.bytes else "", r.note)
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *body])

    __repr__ = __str__


def describe(plan: Plan, states: Sequence[BlockState]) -> Description:
    """The rows of a plan, in the model's order; the bytes of a block stand at its first parameter."""
    rows: dict[str, Row] = {}
    for state in states:
        p = state.plan
        for i, parameter in enumerate(p.block.parameters):
            notes = [note for note in (p.note, p.repr.remark(parameter.shape), p.solver.remark()) if note]
            notes += [f"also used by {layer}" for layer, _ in parameter.uses if layer != parameter.owner]
            if any(_batch_statistics(layer.module) for layer in p.block.layers.values()) and p.kind == "columns":
                notes.append("training-mode batch statistics: columns include cross-example terms")
            rows[parameter.name] = Row(
                parameter.name, parameter.shape, p.block.name, p.triple, _shown(state.damping or p.damping), "; ".join(notes),
                state.bytes_held() if i == 0 else 0,
            )  # fmt: skip
    for name, reason in plan.left.items():
        shape = plan.partition.unheld[name] if name in plan.partition.unheld else plan.partition.parameters[name].shape
        rows[name] = Row(name, shape, "-", "-", "-", reason, 0)
    return Description(tuple(rows[name] for name in (*plan.partition.parameters, *plan.partition.unheld)))


def _shown(damping: Damping) -> str:
    return str(replace(damping, value=float(damping.value)) if isinstance(damping.value, Tensor) else damping)


def _batch_statistics(module: object) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm) and module.training
