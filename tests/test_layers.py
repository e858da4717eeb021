"""Claims about the layer rules of linear layers and norms, float64 at 1e-10, against `torch.func` one example at a time.

- `gradients` by column and example, for all examples and for a slice, with and without bias: Linear with 0 to 3 dimensions between
  examples and features, Conv2d over stride, dilation, padding (numbers, 'same', 'valid'), padding mode and groups, Embedding of any index
  shape with a padding index, LayerNorm over one and two dimensions, BatchNorm by running statistics.
- `total` is autograd's gradient of the whole call, and the sum of `gradients`.
- `rows` are the normal form: sum over rows of g a^T is the gradient, and the weight times a is the layer's output.
- BatchNorm in training mode (rule 8): row i is Gamma_i = sum_r g_ir xhat_ir with the batch's xhat; `total` is exact, and a row is not what
  the example alone would give.
- Refused by name: embeddings whose gradient is sparse, divided by counts, or whose weight is rewritten.

The other families, and every one inside a network, are in `test_layers_cases.py`.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from layer_calls import by_example, call, trainable, whole
from nets import labels, normal, seeded
from precond.layers import OneHot, resolve_rule
from precond.observe import LayerColumns

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def linear(*shape: int, bias: bool = True) -> Any:
    return pytest.param(lambda: nn.Linear(shape[-1], 2, bias=bias), normal(*shape), id=f"linear-{len(shape)}d-{bias}")


def conv(size: int = 6, **options: Any) -> Any:
    return pytest.param(lambda: nn.Conv2d(4, 6, **options), normal(3, 4, size, size - 1), id="conv-" + "-".join(map(str, options.values())))


def other(name: str, build: Any, x: Tensor) -> Any:
    return pytest.param(build, x, id=name)


LINEAR = [linear(3, 4, bias=b) for b in (True, False)] + [linear(3, *between, 4) for between in ((2,), (2, 3), (2, 3, 2))]
CONV = [
    conv(kernel_size=k, stride=s, dilation=d, padding=p, padding_mode=mode, groups=g, bias=s == 1)
    for k, s, d, p, mode, g in itertools.product((3, (2, 3)), (1, 2), (1, 2), (0, (2, 1)), ("zeros", "reflect", "circular"), (1, 2))
]
CONV += [
    conv(kernel_size=k, dilation=d, padding=p, padding_mode=mode, groups=g)
    for k, d, p, mode, g in itertools.product((2, 3), (1, 2), ("same", "valid"), ("zeros", "reflect", "circular"), (1, 2))
]
CONV += [conv(kernel_size=(1, 3), stride=(2, 1), padding=(0, 1), groups=2), conv(kernel_size=2, padding=1, padding_mode="replicate")]
_INDEX = labels(5, 3, 4, 2)
EMBEDDING = [
    other(f"embedding-{index.dim()}d-{pad}", partial(nn.Embedding, 5, 3, padding_idx=pad), index)
    for index in (_INDEX[:, 0, 0], _INDEX[:, :, 0], _INDEX)
    for pad in (None, int(_INDEX[0, 0, 0]))
]
NORM = [
    other("layernorm-2d", lambda: nn.LayerNorm(4), normal(3, 4)),
    other("layernorm-4d", lambda: nn.LayerNorm(4), normal(3, 2, 2, 4)),
    other("layernorm-two", lambda: nn.LayerNorm((2, 4)), normal(3, 2, 4)),
    other("layernorm-two-4d", lambda: nn.LayerNorm((2, 4)), normal(3, 3, 2, 4)),
    other("layernorm-nobias", lambda: nn.LayerNorm(4, bias=False), normal(3, 2, 4)),
    other("batchnorm1d", lambda: nn.BatchNorm1d(4).eval(), normal(3, 4)),
    other("batchnorm1d-3d", lambda: nn.BatchNorm1d(4).eval(), normal(3, 4, 2)),
    other("batchnorm2d", lambda: nn.BatchNorm2d(4).eval(), normal(3, 4, 2, 2)),
    other("batchnorm3d", lambda: nn.BatchNorm3d(2).eval(), normal(3, 2, 2, 2, 2)),
]
every_layer = pytest.mark.parametrize(("build", "x"), LINEAR + CONV + EMBEDDING + NORM)


def gradients(seen: LayerColumns, examples: slice = slice(None)) -> dict[str, Tensor]:
    return resolve_rule(seen.module).gradients(seen, list(trainable(seen.module)), examples)


@every_layer
def test_gradients_are_those_of_each_example_alone(build: Any, x: Tensor) -> None:
    seen = call(seeded(build), x)
    want = by_example(seen)
    close(gradients(seen), want)
    close(gradients(seen, slice(1, 3)), {n: g[:, 1:3] for n, g in want.items()})
    assert all(g.abs().max() > 1e-3 for g in want.values())


@every_layer
def test_the_total_is_autograds(build: Any, x: Tensor) -> None:
    seen = call(seeded(build), x)
    total = resolve_rule(seen.module).total(seen, list(trainable(seen.module)))
    close(total, whole(seen))
    close(total, {n: g.sum((0, 1)) for n, g in gradients(seen).items()})


@every_layer
def test_only_the_asked_parameters_are_given(build: Any, x: Tensor) -> None:
    seen = call(seeded(build), x)
    for name in trainable(seen.module):
        assert list(resolve_rule(seen.module).gradients(seen, [name], slice(None))) == [name]
        assert list(resolve_rule(seen.module).total(seen, [name])) == [name]


@pytest.mark.parametrize(("build", "x"), LINEAR + CONV)
def test_rows_are_the_normal_form(build: Any, x: Tensor) -> None:
    seen = call(seeded(build), x)
    rows = resolve_rule(seen.module).rows(seen)
    assert isinstance(rows.a, Tensor) and not rows.input_first
    G, N, R, _ = rows.a.shape
    assert rows.g.shape[:4] == (2, G, N, R) and seen.batch == N
    weight = seen.module.weight.detach().reshape(G, -1, rows.a.shape[-1])
    close(torch.einsum("kgnro,gnri->kngoi", rows.g, rows.a).reshape(gradients(seen)["weight"].shape), gradients(seen)["weight"])
    output = torch.einsum("gnri,goi->nrgo", rows.a, weight).flatten(2)  # (N, R, out)
    if seen.module.bias is not None:
        output = output + seen.module.bias.detach()
    want = seen.module(x).detach()
    close(output, want.flatten(2).transpose(1, 2) if isinstance(seen.module, nn.Conv2d) else want.reshape(N, R, -1))


@pytest.mark.parametrize(("build", "x"), EMBEDDING)
def test_rows_of_an_embedding_are_one_hot_and_padding_counts_nowhere(build: Any, x: Tensor) -> None:
    seen = call(seeded(build), x)
    rows, pad = resolve_rule(seen.module).rows(seen), seen.module.padding_idx
    assert isinstance(rows.a, OneHot) and rows.input_first and rows.a.size == 5
    hot = nn.functional.one_hot(rows.a.index, 5).double() * rows.a.mask.unsqueeze(-1)
    close(torch.einsum("kgnro,nrv->knvo", rows.g, hot), gradients(seen)["weight"])
    assert torch.equal(rows.a.mask, x.reshape(3, -1) != pad if pad is not None else torch.ones(3, x[0].numel(), dtype=torch.bool))
    if pad is not None:
        assert (x == pad).any(), "the case has padding in it"
        assert not gradients(seen)["weight"][:, :, pad].any()


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize(("build", "shape"), [(nn.BatchNorm1d, (5, 3)), (nn.BatchNorm1d, (5, 3, 2)), (nn.BatchNorm2d, (5, 3, 2, 2))])
def test_batchnorm_in_training_mode_has_the_rows_of_one_pass(build: Any, shape: tuple[int, ...], scale: float) -> None:
    module, x = seeded(lambda: build(3)), normal(*shape)
    with torch.no_grad():
        module.weight.mul_(scale)  # gamma = 0: xhat cannot be had from the output
    seen = call(module, x)
    g, over = seen.grads[0], (0, *range(2, len(shape)))
    mean, var = x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)
    product, shared = g * (x - mean) / (var + module.eps).sqrt(), tuple(range(3, len(shape) + 1))
    want = {"weight": product.sum(shared) if shared else product, "bias": g.sum(shared) if shared else g}
    close(gradients(seen), want)
    close(resolve_rule(module).total(seen, ["weight", "bias"]), whole(seen))
    if len(shape) > 2:  # of a single vector batch statistics do not exist
        alone = by_example(seen)
        close(gradients(seen)["bias"], alone["bias"])
        assert (gradients(seen)["weight"] - alone["weight"]).norm() > 0.1


@pytest.mark.parametrize(("option", "value"), [("sparse", True), ("scale_grad_by_freq", True), ("max_norm", 1.0)])
def test_an_embedding_that_would_be_silently_wrong_is_refused_by_name(option: str, value: Any) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, **{option: value}), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(precond.ObservationError, match=rf"layer '0' \(Embedding\) is refused: {option}.*overrides={{'0': None}}"):
        precond.curvature(model, nn.CrossEntropyLoss(), labels(5, 3, 2), labels(2, 3), matrix="ggn", repr="layer")


def test_a_frozen_bias_has_no_part() -> None:
    module = seeded(lambda: nn.Linear(4, 2))
    module.bias.requires_grad_(False)
    seen = call(module, normal(3, 4))
    close(gradients(seen), by_example(seen))
    assert list(gradients(seen)) == ["weight"]
