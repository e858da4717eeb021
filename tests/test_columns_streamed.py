"""Columns that come a few at a time: one after the other through the graph, in one pass, or in any number of chunks, they are the same.

Claims: the factors do not depend on how many columns are sent back at once, whatever the graph (a short cut, a module called twice, several
outputs); a column that is streamed is handed over a layer at a time; batches whose columns come in different numbers of chunks have one A.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond.observe import observer as observing
from precond.observe import streaming


class Short(nn.Module):
    """A convolution with a short cut around it, then one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.twice, self.end = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = (h + self.second(torch.tanh(h))).mean((2, 3))
        out: Tensor = self.end(torch.tanh(self.twice(torch.tanh(self.twice(h)))))
        return out


class Recurrent(nn.Module):
    """A layer with several outputs, of which the last is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.end = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.cell(x)[0][:, -1])
        return out


CASES = {
    "short": (Short, (6, 2, 4, 4)),
    "recurrent": (Recurrent, (6, 5, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)), (6, 3)),
}


def curve(name: str, repr: str, **changes: Any) -> precond.operators.Operator:
    torch.manual_seed(1)
    make, shape = CASES[name]
    model = make().double()
    data: dict[str, Any] = {"inputs": torch.randn(shape, dtype=torch.float64), "targets": torch.randint(4, shape[:1])}
    if changes.get("batches"):
        sizes = changes.pop("batches")
        data = {"batches": list(zip(data["inputs"].split(sizes), data["targets"].split(sizes), strict=True))}
    return precond.curvature(model, nn.CrossEntropyLoss(), matrix="ggn", repr=repr, seed=0, **data, **changes)


@pytest.mark.parametrize("repr", ["kron_io", "diagonal", "layer"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [1, 300])
def test_factors_do_not_depend_on_how_many_columns_are_sent_at_once(
    monkeypatch: pytest.MonkeyPatch, elements: int, name: str, repr: str
) -> None:
    together = curve(name, repr).to_dense()
    monkeypatch.setattr(observing, "_COLUMN_ELEMENTS", elements)
    torch.testing.assert_close(curve(name, repr).to_dense(), together, rtol=1e-10, atol=1e-12)


def test_a_streamed_column_is_handed_over_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    arrive = streaming._Stream._arrive

    def counted(self: streaming._Stream, slot: Any, grad: Tensor | None) -> None:
        held.append(len(self.seen))
        arrive(self, slot, grad)

    monkeypatch.setattr(observing, "_COLUMN_ELEMENTS", 1)
    monkeypatch.setattr(streaming._Stream, "_arrive", counted)
    curve("short", "kron_io")
    assert len(held) == 4 * 5  # columns times calls
    assert max(held) == 1  # the first of the two calls of `twice`, which are one block
    held.clear()
    curve("short", "full")
    assert max(held) == 4  # the control: one block of all layers has to wait for all of them


def test_batches_whose_columns_come_in_different_numbers_of_chunks_have_one_input_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = curve("mlp", "kron_io").to_dense()
    monkeypatch.setattr(observing, "_COLUMN_ELEMENTS", 36)  # 1 column of four examples, 2 of two
    torch.testing.assert_close(curve("mlp", "kron_io", batches=[4, 2]).to_dense(), whole, rtol=1e-10, atol=1e-12)
