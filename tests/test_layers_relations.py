"""Identity 21 and what else one layer says of another, float64 at 1e-10, and what must differ does.

- A grouped convolution, and a grouped transposed one, is block-diagonal over one convolution a group; their groups do differ.
- A transposed convolution exchanges the roles of the convolution with the same weight: its (a, g) are the other's (g, a).
- Conv1d is Conv2d with a dimension of one; a 1x1 convolution and `transformers`' Conv1D are a Linear layer, up to the order of the weight.
- An EmbeddingBag of one entry is an Embedding; a bag of sums is a Linear layer on counts.
- Attention: the packed form of one input has the A of each projection, and its B holds those of the three as diagonal blocks; three
  inputs are refused for it. Two modules with the same weights, packed and separate, have the same gradients.
- Rows that flatten batch and positions say so for convolutions and channel norms, and without it they are refused by name.
- A step on an empty batch is refused, and so is `curvature` of one.
- Shapes that hypothesis draws: the rows of a convolution multiply to its output, and to its gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dense
import precond
from layer_calls import by_example, call, trainable, whole
from layer_cases import LAYERS, Attends, Conv1D, affine
from nets import labels, normal, seeded
from precond.layers import resolve_rule
from precond.observe import LayerColumns
from precond.representations import KronIO

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE = nn.CrossEntropyLoss()


def rows(seen: LayerColumns) -> Any:
    return resolve_rule(seen.module).rows(seen)


def gradients(seen: LayerColumns) -> dict[str, Tensor]:
    return resolve_rule(seen.module).gradients(seen, list(trainable(seen.module)), slice(None))


def kron(model: nn.Module, x: Tensor, repr: Any = "kron_io", **options: Any) -> Any:
    return precond.curvature(model, CE, x, labels(2, len(x)), matrix="ggn", repr=repr, **options)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_grouped_convolution_is_one_convolution_a_group(kind: Any) -> None:
    module, x = seeded(lambda: kind(4, 6, 3, stride=2, padding=1, groups=2)), normal(3, 4, 5)
    seen = call(module, x)
    together = rows(seen)
    for group in range(2):
        alone = seeded(lambda: kind(2, 3, 3, stride=2, padding=1))
        part = LayerColumns("g", alone, (x[:, 2 * group : 2 * group + 2],), {}, (seen.grads[0][:, :, 3 * group : 3 * group + 3],), True, 3)
        close(together.a[group], rows(part).a[0])
        close(together.g[:, group], rows(part).g[:, 0])
    assert (together.a[0] - together.a[1]).norm() > 0.1


def test_a_transposed_convolution_exchanges_the_roles_of_a_convolution() -> None:
    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 2, "bias": False}
    forward, transposed = seeded(lambda: nn.Conv2d(2, 3, 3, **options)), seeded(lambda: nn.ConvTranspose2d(3, 2, 3, **options))
    small, large = normal(2, 3, 3, 4, seed=3), normal(2, 2, 7, 9, seed=4)
    assert forward(large).shape == small.shape and transposed(small).shape == large.shape
    down = rows(LayerColumns("c", forward, (large,), {}, (small.unsqueeze(0),), True, 2))
    up = rows(LayerColumns("t", transposed, (small,), {}, (large.unsqueeze(0),), True, 2))
    close(up.a, down.g[0])
    close(up.g[0], down.a)
    assert up.input_first and not down.input_first


def test_conv1d_is_conv2d_with_a_dimension_of_one() -> None:
    line, plane = (
        seeded(lambda: nn.Conv1d(4, 2, 3, padding=1, stride=2)),
        seeded(lambda: nn.Conv2d(4, 2, (3, 1), padding=(1, 0), stride=(2, 1))),
    )
    seen = call(line, normal(3, 4, 5))
    flat = LayerColumns("p", plane, (seen.input.unsqueeze(-1),), {}, (seen.grads[0].unsqueeze(-1),), True, 3)
    close(rows(seen).a, rows(flat).a)
    close(rows(seen).g, rows(flat).g)
    wide = seeded(lambda: nn.Conv2d(4, 2, (3, 1), padding=(1, 1), stride=(2, 1)))
    assert wide(seen.input.unsqueeze(-1)).shape != plane(seen.input.unsqueeze(-1)).shape


def test_a_pointwise_convolution_is_a_linear_layer_on_positions() -> None:
    seen = call(seeded(lambda: nn.Conv3d(4, 2, 1)), normal(3, 4, 2, 1, 3))
    moved = LayerColumns("l", seeded(lambda: nn.Linear(4, 2)), (seen.input.movedim(1, -1),), {}, (seen.grads[0].movedim(2, -1),), True, 3)
    close(rows(seen).a, rows(moved).a)
    close(rows(seen).g, rows(moved).g)


@pytest.mark.parametrize("repr", ["kron_io", "unit", "layer", "diagonal"])
def test_the_linear_layer_of_transformers_is_a_linear_layer(repr: str) -> None:
    """In its own order of theta: the weight is stored transposed."""
    stored, x = seeded(lambda: nn.Sequential(Conv1D(2, 4))), normal(3, 4)
    linear = nn.Sequential(nn.Linear(4, 2)).double()
    with torch.no_grad():
        linear[0].weight.copy_(stored[0].weight.T)
        linear[0].bias.copy_(stored[0].bias)
    order = torch.cat([torch.arange(8).view(2, 4).T.flatten(), torch.arange(8, 10)])
    ours, theirs = kron(stored, x, repr).to_dense(), kron(linear, x, repr).to_dense()
    close(ours, theirs[order][:, order])
    assert (ours - theirs).norm() > 1e-3


def test_a_bag_of_one_is_an_embedding_and_a_bag_of_sums_a_linear_layer_on_counts() -> None:
    index, weight = labels(5, 3, 4), normal(5, 2)
    one = call(seeded(lambda: nn.EmbeddingBag(5, 2, mode="mean")), index[:, :1])
    single = LayerColumns("e", seeded(lambda: nn.Embedding(5, 2)), (index[:, 0],), {}, one.grads, True, 3)
    close(gradients(one)["weight"], gradients(single)["weight"])
    bag = call(nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum"), index)
    counts = nn.functional.one_hot(index, 5).sum(1).double()
    close(gradients(bag)["weight"], torch.einsum("kno,nv->knvo", bag.grads[0], counts))
    mean = LayerColumns("m", nn.EmbeddingBag.from_pretrained(weight, freeze=False), (index,), {}, bag.grads, True, 3)
    close(4 * gradients(mean)["weight"], gradients(bag)["weight"])


def attends(**options: Any) -> nn.Module:
    return seeded(lambda: nn.Sequential(Attends(batch_first=True, **options), nn.Flatten(), nn.Linear(12, 2)))


def test_packed_projections_joined_have_one_input_factor_and_all_output_factors() -> None:
    model, x = attends(), normal(3, 3, 4)
    split, joint = (kron(model, x, KronIO(packed=p)).blocks["0.attention.in_proj"] for p in ("split", "joint"))
    B, A = (f.to_dense() for f in joint.factors)
    assert B.shape == (12, 12) and A.shape == (5, 5)
    for part, (left, right) in enumerate(zip(split.factors[0].matrix, split.factors[1].matrix, strict=True)):
        close(right, A)
        close(left, B[4 * part : 4 * part + 4, 4 * part : 4 * part + 4])
    assert B[4:8, 8:].norm() > 1e-3 * B.norm()
    with pytest.raises(precond.ObservationError, match="query, key and value are not one and the same tensor there; use packed='split'"):
        kron(attends(slices=(slice(None), slice(0, 2), slice(0, 2))), x, KronIO(packed="joint"))


def test_separate_projections_of_equal_widths_are_the_packed_ones() -> None:
    packed, separate = (seeded(lambda w=w: nn.MultiheadAttention(4, 2, batch_first=True, kdim=w, vdim=w)) for w in (4, 3))
    with torch.no_grad():
        for n in "qkv":
            getattr(separate, f"{n}_proj_weight").copy_(packed.in_proj_weight.chunk(3)["qkv".index(n)][:, : 4 if n == "q" else 3])
        packed.in_proj_weight[4:, 3] = 0.0
        separate.in_proj_bias.copy_(packed.in_proj_bias)
        separate.out_proj.load_state_dict(packed.out_proj.state_dict())
    x = normal(3, 2, 4)
    seen = call(packed, x, x, x, need_weights=False)
    apart = LayerColumns("a", separate, (x, x[..., :3], x[..., :3]), {"need_weights": False}, seen.grads, True, 3)
    ours, theirs = gradients(apart), gradients(seen)
    for i, n in enumerate("qkv"):
        close(ours[f"{n}_proj_weight"], theirs["in_proj_weight"][:, :, 4 * i : 4 * i + 4, : 4 if n == "q" else 3])
    close(ours["in_proj_bias"], theirs["in_proj_bias"])
    close({n: g.sum((0, 1)) for n, g in ours.items()}, whole(apart))


class Frames(nn.Module):
    """A layer on the frames of (N, T, C, L), which it sees as (N T, C, L)."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(y.tanh().mean(1).flatten(1))


@pytest.mark.parametrize(
    ("build", "width", "factors"),
    [
        (lambda: nn.Conv1d(4, 2, 2, groups=2), 8, True),
        (lambda: nn.ConvTranspose1d(4, 2, 2, bias=False), 12, True),
        (lambda: nn.ConvTranspose1d(4, 2, 2), 12, False),
        (lambda: affine(nn.GroupNorm(2, 4)), 20, False),
        (lambda: nn.PReLU(4), 20, False),
    ],
)
def test_frames_that_are_flattened_into_the_batch_say_so(build: Any, width: int, factors: bool) -> None:
    model, x = seeded(lambda: Frames(build(), width)), normal(2, 3, 4, 5)
    M = dense.ggn(model, CE, x, labels(2, 2))
    close(kron(model, x, "full", rows={"layer": "flattened"}).to_dense(), M)
    if factors:  # they need no examples
        close(kron(model, x, "kron_io").to_dense(), kron(model, x, "kron_io", rows={"layer": "flattened"}).to_dense())
    with pytest.raises(precond.ObservationError, match="layer 'layer' has 6 leading rows for a batch of 2"):
        kron(model, x, "full")


@st.composite
def convolutions(draw: Any) -> tuple[Any, Tensor]:
    """A module in one to two dimensions, transposed or not, and an input that it takes."""
    spatial, transposed = draw(st.integers(1, 2)), draw(st.booleans())
    sizes = st.tuples(*[st.integers(1, 3)] * spatial)
    kernel, stride, dilation, groups = draw(sizes), draw(sizes), draw(sizes), draw(st.integers(1, 2))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    shape = [draw(st.integers(1 if transposed else r, r + 2)) for r in reach]
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        ends = [(n - 1) * s - 2 * p + r + o for n, s, p, r, o in zip(shape, stride, padding, reach, options["output_padding"], strict=True)]
        shape = [n + max(0, 1 - end) for n, end in zip(shape, ends, strict=True)]
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    channels = draw(st.integers(1, 2)) * groups, draw(st.integers(1, 2)) * groups
    return (lambda: kind(*channels, kernel, **options)), normal(draw(st.integers(1, 3)), channels[0], *shape)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(convolutions())
def test_convolutions_of_any_shape_have_the_gradients_of_each_example_alone(drawn: Any) -> None:
    build, x = drawn
    module = seeded(build)
    seen = call(module, x, columns=1)
    want = by_example(seen)
    close(gradients(seen), want)
    close(resolve_rule(module).total(seen, list(want)), whole(seen))
    r = rows(seen)
    assert r.a.shape[:3] == r.g.shape[1:4] and r.a.shape[1] == len(x)
    if not module.transposed:
        weight = module.weight.detach().reshape(module.groups, -1, r.a.shape[-1])
        output = torch.einsum("gnri,goi->ngor", r.a, weight).flatten(1, 2)
        bias = 0 if module.bias is None else module.bias.detach()[:, None]
        close(output + bias, module(x).detach().flatten(2))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.booleans())
def test_sequences_of_any_length_have_the_gradients_of_each_example_alone(
    n: int, time: int, memory: int, heads: int, first: bool, extra: bool
) -> None:
    module = seeded(lambda: nn.MultiheadAttention(2 * heads, heads, batch_first=first, add_bias_kv=extra, add_zero_attn=extra))
    query, key = normal(n, time, 2 * heads), normal(n, memory, 2 * heads, seed=3)
    if not first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    seen = call(module, query, key, key, batch=n, columns=1, need_weights=False)
    got = gradients(seen)
    close(
        got, by_example(seen, 0 if first else 1, pick=lambda name, a, i: a.narrow(0 if first else 1, i, 1) if isinstance(a, Tensor) else a)
    )
    close({name: g.sum((0, 1)) for name, g in got.items()}, whole(seen))


@pytest.mark.parametrize("repr", ["kron_io", "layer_gram", "diagonal", "matrix_free"])
def test_a_step_on_no_examples_is_refused_in_one_sentence(repr: str) -> None:
    model = seeded(lambda: nn.Linear(3, 2))
    preconditioner = precond.Preconditioner(matrix="ggn", repr=repr, solver="cg", damping=0.1)
    with preconditioner.attach(model, CE, torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(precond.UsageError, match="a batch of inputs holds no examples: curvature needs at least one"):
            model(normal(0, 3))
        with torch.no_grad():
            assert model(normal(0, 3)).shape == (0, 2), "an evaluation is nobody's business"


@pytest.mark.parametrize("name", ["conv1d", "transposed2d", "groupnorm", "self", "gru", "bag-sum"])
def test_a_batch_without_examples_is_refused_in_one_sentence(name: str) -> None:
    case = LAYERS[name]
    with pytest.raises(precond.UsageError, match="a batch of inputs holds no examples: curvature needs at least one"):
        precond.curvature(case.make(), CE, case.inputs[:0], case.targets[:0], matrix="ggn", repr="layer")
