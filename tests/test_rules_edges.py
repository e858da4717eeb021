"""Rule 3 claims: after an in-place activation the columns are those of the layer's own output, in a nested pass (one column, or several
at once) and in the user's backward pass; an edge taken from the tensor afterwards, as is natural, would give other numbers, silently.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.testing import assert_close

from nets import CASES
from precond.observe import recorder
from precond.observe.records import Call
from training import EXACT, differ, make, matrix_of, of, plain, sgd

CASE = CASES["mlp"]  # Linear, ReLU(inplace), Linear, ReLU(inplace), Linear


def observed(matrix: Any, repr: str = "full") -> Any:
    model = CASE.make()
    preconditioner, optimizer = make(matrix, repr), sgd(model)
    preconditioner.attach(model, CASE.criterion, optimizer)
    plain(model, CASE.criterion, optimizer, CASE.inputs, CASE.targets)
    return preconditioner


@pytest.mark.parametrize("matrix", ["ggn", "fisher", "empirical_fisher"])
def test_columns_before_an_in_place_activation_are_exact(matrix: str) -> None:
    assert_close(matrix_of(observed(matrix)), of(matrix, CASE.criterion)(CASE.make(), CASE.inputs, CASE.targets), **EXACT)


@pytest.mark.parametrize("matrix", ["ggn", "fisher_mc"])
def test_differentiating_by_the_tensor_would_be_seen(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = matrix_of(observed(matrix))
    tensors: dict[int, Any] = {}

    def remember(tensor: Any) -> GradientEdge:
        edge = get_gradient_edge(tensor)
        tensors[id(edge)] = (edge, tensor)
        return edge

    resolve = Call.resolve

    def by_tensor(self: Call, nodes: Any) -> list[Any]:
        late = [get_gradient_edge(tensors[id(e)][1]) if isinstance(e, GradientEdge) else e for e in self.edges]
        numbers = [e.output_nr if isinstance(e, GradientEdge) else n for e, n in zip(late, self.edge_numbers, strict=True)]
        self.edges, self.edge_numbers = late, numbers
        return resolve(self, nodes)

    monkeypatch.setattr(recorder, "get_gradient_edge", remember)
    monkeypatch.setattr(Call, "resolve", by_tensor)
    differ(matrix_of(observed(matrix)), expected)
