"""Four errors that well-known packages make silently, and the right answers, in float64 to 1e-10 (`tests/oracles` shows them wrong).

- Targets in probabilities: their number is that of the rows, not of the numbers in them.
- Label smoothing and class weights with sampled labels: a label of the model is scored by the plain -log p, times the root of the
  term's weight. So the expectation over all labels is the Fisher matrix; scored by the criterion itself it is not.
- A module called twice: its calls are positions of one module, in A a mean over both, and its gradient is their sum.
- A grouped convolution: a block for each group, over the channels of that group.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_cells
import dense_kron
import precond
from nets import CASES, Case, labels, normal, seeded
from precond.representations import KronIO

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)

W = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
SMALL = CASES["mlp"]


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=4, bias=False), nn.Flatten(), nn.Linear(4, 3))


def _soft(name: str, **options: object) -> Case:
    return Case(name, SMALL.make, nn.CrossEntropyLoss(**options), SMALL.inputs, normal(6, 3, seed=4).softmax(1))


NETS = {
    case.name: case
    for case in (
        _soft("soft"),
        _soft("soft-sum", reduction="sum"),
        _soft("soft-weighted", weight=W, label_smoothing=0.2),
        CASES["reused"],
        Case("grouped", lambda: seeded(_grouped), nn.CrossEntropyLoss(), normal(3, 4, 3, 3), labels(3, 3)),
    )
}


def curve(case: Case, matrix: str, repr: object, **more: object) -> precond.operators.Operator:
    return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix=matrix, repr=repr, **more)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("name", NETS)
def test_every_form_of_the_matrix(name: str, matrix: str, sharing: str) -> None:
    case = NETS[name]
    M = getattr(dense, matrix)(case.make(), case.criterion, case.inputs, case.targets)
    close(curve(case, matrix, "full").to_dense(), M)
    close(curve(case, matrix, "layer").to_dense(), dense.project_layer(M, case.make()))
    close(curve(case, matrix, "diagonal").to_dense(), dense.project_diagonal(M))
    C, sent = curve(case, matrix, KronIO(sharing=sharing)).to_dense(), dense_cells.cotangents(case, matrix)
    rule = dense_kron.kron_expand if sharing == "expand" else dense_kron.kron_reduce
    want = torch.zeros_like(C)
    for layer, _ in dense.layer_groups(case.make()):
        pairs = rule(case.make(), case.criterion, case.inputs, case.targets, sent, layer)
        place = dense.joint_indices(case.make(), layer)
        blocks = (torch.kron(B.contiguous(), A.contiguous()) for B, A in (pairs if isinstance(pairs, list) else [pairs]))
        want[place.unsqueeze(1), place] = torch.block_diag(*blocks)
    close(C, want)


def test_targets_in_probabilities_that_are_one_hot_are_labels() -> None:
    soft = Case("one-hot", SMALL.make, SMALL.criterion, SMALL.inputs, nn.functional.one_hot(SMALL.targets, 3).double())
    for matrix, repr in itertools.product(("ggn", "fisher", "empirical_fisher"), ("full", "kron_io")):
        close(curve(soft, matrix, repr).to_dense(), curve(SMALL, matrix, repr).to_dense())


OPTIONS = [{"label_smoothing": 0.3}, {"weight": W}, {"weight": W, "label_smoothing": 0.3}]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_the_expectation_over_labels_honours_the_options(options: dict, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every label that a generator may draw: multinomial is told the answer, the rest is the library's own."""
    criterion, x, y = nn.CrossEntropyLoss(reduction=reduction, **options), SMALL.inputs[:2], SMALL.targets[:2]
    case = Case("sampled", SMALL.make, criterion, x, y)
    p, given = dense.predict(SMALL.make(), x).softmax(1), []
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kwargs: given[0].unsqueeze(1))
    sampled, naive = 0.0, 0.0
    for draw in itertools.product(range(3), repeat=2):
        label = torch.tensor(draw)
        given[:] = [label]
        probability = p[0, draw[0]] * p[1, draw[1]]
        sampled = sampled + probability * curve(case, "fisher_mc", "full", seed=0).to_dense()
        naive = naive + probability * dense.empirical_fisher(SMALL.make(), criterion, x, label)
    want = dense.fisher(SMALL.make(), criterion, x, y)
    close(sampled, want)
    assert (naive - want).norm() > 0.02 * want.norm()


def test_a_module_called_twice_is_one_module() -> None:
    C, case = curve(CASES["reused"], "ggn", "kron_io"), CASES["reused"]
    seen: list[Tensor] = []
    model = case.make()
    model.layer.register_forward_pre_hook(lambda _, args: seen.append(torch.cat([args[0], torch.ones(6, 1, dtype=torch.float64)], 1)))
    dense.predict(model, case.inputs)
    rows = torch.cat(seen).detach()
    assert len(rows) == 12
    close(C.blocks["layer"].factors[1].to_dense(), rows.T @ rows / 12)


def test_groups_of_a_convolution_have_blocks_of_their_own() -> None:
    C = curve(NETS["grouped"], "ggn", "kron_io").blocks["0"].to_dense()
    assert C.shape == (36, 36) and C[:18, 18:].norm() == 0
    assert (C[:18, :18] - C[18:, 18:]).norm() > 0.1 * C.norm()
