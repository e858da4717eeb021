"""The Kronecker oracle against the dense one, where theory says that they agree, and where it says that they do not (float64, 1e-10).

Claims:

* the loop over kernel positions is the convolution: patches times weights give its output, for stride, padding, dilation, groups, 1-d;
* expand and reduce are the exact block for one example without shared positions, any network and loss, in-place activations included;
  for more examples they are not with cross-entropy, and they are for a deep linear network with squared error (identity 14);
* expand is exact for a deep linear network with squared error at each position, convolutions and grouped ones included; not after
  pooling, not with cross-entropy. Reduce is exact with mean pooling before the loss; not without it (identity 15);
* a module used twice on separate inputs: expand is exact with its uses as positions;
* expand == reduce with one position;
* the dimension-wise factors have equal traces, that of the tensor's block, and match E[G G^T] and E[G^T G] (identity 20).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_kron
from nets import CASES, labels, normal, seeded

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


class Mean(nn.Module):
    """The mean over the given dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class Move(nn.Module):
    """Channels to the end, so that an event is one location."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class Halves(nn.Module):
    """One Linear on each half of the input, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x[:, :3]), self.layer(x[:, 3:])], 1)


def deep_linear(*after: nn.Module, outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, outputs, bias=False), *after))


def errors(model: nn.Module, criterion: nn.Module, inputs: Tensor, targets: Tensor, how: str, layers: list[str]) -> list[float]:
    """The relative Frobenius distance of B (x) A from the exact GGN block of each layer."""
    G = dense.ggn(model, criterion, inputs, targets)
    columns = dense.exact_cotangents(criterion, dense.predict(model, inputs), targets, len(inputs))
    found = []
    for name in layers:
        pairs = getattr(dense_kron, f"kron_{how}")(model, criterion, inputs, targets, columns, name)
        approximate = torch.block_diag(*(torch.kron(B, A) for B, A in (pairs if isinstance(pairs, list) else [pairs])))
        index = dense.joint_indices(model, name)
        block = G[index][:, index]
        found.append(float((approximate - block).norm() / block.norm()))
    return found


CONVOLUTIONS = {
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, (2, 3), padding=(1, 2), dilation=(2, 1), stride=(1, 2)), (2, 2, 5, 6)),
    "same": (lambda: nn.Conv2d(2, 3, 2, padding="same", dilation=3, bias=False), (2, 2, 5, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 2, 5, 6)),
    "depthwise_1d": (lambda: nn.Conv1d(4, 4, 3, stride=2, groups=4), (2, 4, 9)),
    "volume": (lambda: nn.Conv3d(2, 2, 2, padding=(0, 1, 0)), (2, 2, 3, 2, 4)),
}


@pytest.mark.parametrize(("build", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_patches_times_weights_are_the_convolution(build: object, shape: tuple[int, ...]) -> None:
    conv, x = seeded(build), normal(*shape)
    output = dense.predict(conv, x)
    pairs = dense_kron.capture(conv, x, torch.ones_like(output).unsqueeze(0), "")
    joint = conv.weight.flatten(1) if conv.bias is None else torch.cat([conv.weight.flatten(1), conv.bias.unsqueeze(1)], 1)
    assert len(pairs) == conv.groups
    parts = [a @ W.T for (a, _), W in zip(pairs, joint.chunk(conv.groups), strict=True)]
    close(torch.cat(parts, -1).detach(), output.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("how", ["expand", "reduce"])
def test_one_example_without_sharing_is_exact_for_any_network_and_loss(how: str) -> None:
    for name, layers in (("mlp", ["0", "2", "4"]), ("mse", ["0", "2"]), ("bce", ["0", "2"])):
        case = CASES[name]
        one = case.make(), case.criterion, case.inputs[:1], case.targets[:1]
        assert max(errors(*one, how, layers)) < 1e-10
        one_repeated = case.make(), case.criterion, case.inputs[:1].repeat(6, 1), case.targets
        assert max(errors(*one_repeated, how, layers)) < 1e-10


def test_several_examples_are_exact_only_with_a_decoupled_output_gradient() -> None:
    x, y = normal(6, 4), normal(6, 3, seed=5)
    assert max(errors(deep_linear(), nn.MSELoss(), x, y, "expand", ["0", "1"])) < 1e-10
    assert max(errors(deep_linear(), nn.MSELoss(reduction="sum"), x, y, "expand", ["0", "1"])) < 1e-10
    assert min(errors(deep_linear(), nn.CrossEntropyLoss(), x, labels(3, 6), "expand", ["0", "1"])) > 1e-3
    first, last = errors(CASES["mse"].make(), nn.MSELoss(), x, y[:, :2], "expand", ["0", "2"])
    assert first > 1e-2
    assert last < 1e-10


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_expand_is_exact_for_squared_error_at_each_position(reduction: str) -> None:
    x, y, criterion = normal(3, 5, 4), normal(3, 5, 3, seed=5), nn.MSELoss(reduction=reduction)
    assert max(errors(deep_linear(), criterion, x, y, "expand", ["0", "1"])) < 1e-10
    assert min(errors(deep_linear(), criterion, x, y, "reduce", ["0", "1"])) > 1e-2
    assert min(errors(deep_linear(Mean(1)), criterion, x, y[:, 0], "expand", ["0", "1"])) > 1e-2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduce_is_exact_for_squared_error_after_mean_pooling(reduction: str) -> None:
    x, y, criterion = normal(3, 5, 4), normal(3, 3, seed=5), nn.MSELoss(reduction=reduction)
    assert max(errors(deep_linear(Mean(1)), criterion, x, y, "reduce", ["0", "1"])) < 1e-10
    one = deep_linear(Mean(1)), nn.CrossEntropyLoss(), x[:1], labels(3, 1)
    assert max(errors(*one, "reduce", ["0", "1"])) < 1e-10
    assert min(errors(*one, "expand", ["0", "1"])) > 1e-2


def test_expand_is_not_exact_for_cross_entropy_at_each_position() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Flatten(0, 1)))
    assert min(errors(model, nn.CrossEntropyLoss(), normal(1, 7, 4), labels(3, 7), "expand", ["0", "1"])) > 1e-3


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_exact_under_the_same_conditions(groups: int) -> None:
    def build(*after: nn.Module) -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=groups), *after))

    x, criterion = normal(3, 2, 5, 6), nn.MSELoss()
    located, pooled = normal(3, 3, 3, 4, seed=5), normal(3, 4, seed=6)
    assert errors(build(Move()), criterion, x, located, "expand", ["0"])[0] < 1e-10
    assert errors(build(Move()), criterion, x, located, "reduce", ["0"])[0] > 1e-2
    assert errors(build(Mean(2, 3)), criterion, x, pooled, "reduce", ["0"])[0] < 1e-10
    assert errors(build(Mean(2, 3)), criterion, x, pooled, "expand", ["0"])[0] > 1e-2


def test_a_module_used_twice_is_exact_with_its_uses_as_positions() -> None:
    for count in (1, 4):
        assert errors(seeded(Halves), nn.MSELoss(), normal(count, 6), normal(count, 4, seed=5), "expand", ["layer"])[0] < 1e-10
    assert errors(seeded(Halves), nn.MSELoss(), normal(1, 6), normal(1, 4, seed=5), "reduce", ["layer"])[0] > 1e-2


def test_expand_is_reduce_with_one_position() -> None:
    case = CASES["mlp"]
    loss = case.make(), case.criterion, case.inputs, case.targets
    columns = dense.exact_cotangents(case.criterion, dense.predict(loss[0], case.inputs), case.targets, 6)
    for name in ("0", "2", "4"):
        close(dense_kron.kron_expand(*loss, columns, name), dense_kron.kron_reduce(*loss, columns, name))


@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_dimension_wise_factors_share_the_trace_of_the_block(name: str) -> None:
    case = CASES[name]
    loss = case.make(), case.criterion, case.inputs, case.targets
    output = dense.predict(loss[0], case.inputs)
    columns = dense.exact_cotangents(case.criterion, output, case.targets, len(case.inputs))
    U = dense.column_gradients(loss[0], case.criterion, case.inputs, columns)
    scale = dense.scale(case.criterion, output, case.targets)
    diagonal = dense.split(dense.ggn(*loss).diagonal(), loss[0])
    for key, part in dense.split(U, loss[0]).items():
        factors = dense_kron.kron_dim(part.flatten(0, 1), scale)
        assert [len(factor) for factor in factors] == list(diagonal[key].shape)
        for factor in factors:
            close(factor.trace(), diagonal[key].sum())


def test_dimension_wise_factors_of_a_matrix_are_its_left_and_right_products() -> None:
    gradients = normal(6, 3, 4)
    left, right = dense_kron.kron_dim(gradients, 0.5)
    close(left, 0.5 * torch.einsum("nij,nkj->ik", gradients, gradients))
    close(right, 0.5 * torch.einsum("nij,nik->jk", gradients, gradients))
    u, v = normal(3), normal(4, seed=3)
    rank_one = torch.kron(*dense_kron.kron_dim(torch.outer(u, v).unsqueeze(0)))
    vec = torch.outer(u, v).flatten()
    close(rank_one, torch.outer(vec, vec) * vec.square().sum())
