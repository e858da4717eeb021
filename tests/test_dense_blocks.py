"""The projections of the dense oracle: blocks of layers, tensors and units, and the diagonal (identity 13).

Claims: blocks are disjoint, cover theta and nest (diagonal in unit and tensor, both in layer); a layer holds its weight and bias, packed
attention its output projection too, a tied weight its first owner; frozen parameters have no place; units of a Linear and of a norm have
their closed forms; `split` gives each parameter its part.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import dense
from nets import CASES, Case


def parts_of(case: Case) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    return case.make(), case.criterion, case.inputs, case.targets


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_projections_cover_and_nest(case: Case) -> None:
    model = case.make()
    P = sum(p.numel() for p in model.parameters())
    M = torch.ones(P, P)
    masks = [dense.project_diagonal(M), dense.project_unit(M, model), dense.project_layer(M, model), M]
    tensor = dense.project_tensor(M, model)
    assert sorted(torch.cat(dense.unit_indices(model)).tolist()) == list(range(P))
    assert sorted(name for _, group in dense.layer_groups(model) for name in group) == sorted(dense.positions(model))
    for inner, outer in [*itertools.pairwise(masks), (masks[0], tensor), (tensor, masks[2])]:
        assert (inner <= outer).all()
        assert inner.sum() < outer.sum() or outer is M
    assert tensor.sum() == sum(p.numel() ** 2 for p in model.parameters())


def test_a_layer_holds_its_weight_and_bias_and_packed_attention_its_output_projection() -> None:
    groups = dict(dense.layer_groups(CASES["mha"].make()))
    weights = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert groups == {"attention": [f"attention.{name}" for name in weights], "head": ["head.weight", "head.bias"]}
    assert "head" not in dict(dense.layer_groups(CASES["transformer"].make()))
    model = CASES["mlp"].make()
    model[2].weight.requires_grad_(False)
    assert dense.layer_groups(model)[1] == ("2", ["2.bias"])
    assert dense.positions(model)["2.bias"] == slice(25, 29)
    assert [len(unit) for unit in dense.unit_indices(model)] == [5] * 5 + [1] * 4 + [5] * 3


def test_units_of_a_linear_and_of_a_norm_have_their_closed_forms() -> None:
    model, criterion, inputs, targets = parts_of(CASES["mlp"])
    units, M = dense.unit_indices(model), dense.empirical_fisher(model, criterion, inputs, targets)
    places = dense.positions(model)
    examples = dense.per_example_gradients(model, criterion, inputs, targets)
    g, a = examples[:, places["0.bias"]], torch.cat([inputs, torch.ones(6, 1).double()], 1)
    for o in range(5):
        torch.testing.assert_close(M[units[o]][:, units[o]], (a * g[:, o : o + 1].square()).T @ a / 6, rtol=1e-10, atol=1e-10)
    norm = CASES["transformer"].make()
    start = dense.positions(norm)["norm1.weight"].start
    assert [start, start + 4] in [unit.tolist() for unit in dense.unit_indices(norm)]


def test_split_gives_each_parameter_its_shape() -> None:
    model, criterion, inputs, targets = parts_of(CASES["conv"])
    parts = dense.split(dense.gradient(model, criterion, inputs, targets), model)
    criterion(model(inputs), targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parts[name], parameter.grad, rtol=1e-10, atol=1e-10)
