"""The second moment of a convolution's patches by lags, without patches, against the loop over kernel positions (float64, 1e-10).

Claims:

* for every kernel, dilation, padding, mode, number of groups and channels, one example included: the sum of a a^T by lags is that of the
  patches;
* strips at the border count: leaving them out is seen, unless the image is zero there;
* any split into pieces of few examples or few channels at a time has the same sum;
* the operations that the cost model counts are those that are made, and the rule takes what costs less; another stride takes patches;
* `kron_io`, FOOF and `kron_eigen` are the same by either way and by both, with batches of unequal size, ignored targets, a module called at
  several sizes and flattened batches; `kron_io` and FOOF equal the oracle, and no patch is formed where nothing needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import dense_derived
import dense_kron
import precond
from nets import labels, normal, seeded
from precond.layers import conv, lags
from precond.layers.conv import Convolution, patch_second_moment
from precond.layers.lag_cost import Cost, by_lags, by_patches
from precond.layers.lags import Line
from precond.observe import LayerColumns
from precond.representations import KronEigen, KronIO

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
KINDS: dict[int, Callable[..., _ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NOTHING, EVERYTHING = Cost(0.0, 0.0, 0.0), Cost(float("inf"), 0.0, 0.0)


def oracle(module: _ConvNd, x: Tensor, bias: bool) -> Tensor:
    """(G, in', in') by the rows of the oracle."""
    rows = [a.flatten(0, 1) for a in dense_kron._input_rows(module, x, len(x))]
    if not bias:
        rows = [a[:, : module.weight[0].numel()] for a in rows]
    return torch.stack([a.T @ a for a in rows])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[_ConvNd, Tensor]:
    spatial = draw(st.integers(1, 3))
    each = partial(st.lists, min_size=spatial, max_size=spatial)
    kernel, dilation = draw(each(st.integers(1, 5 - spatial))), draw(each(st.integers(1, 3)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.one_of(st.sampled_from(["same", "valid"]), each(st.integers(0, 3)).map(tuple)))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    sides = reach if padding == "same" else [0] * spatial if padding == "valid" else list(padding)
    least = [max(1, side + 1, 0 if padding == "same" else r + 1 - 2 * side) for side, r in zip(sides, reach, strict=True)]
    sizes = [low + extra for low, extra in zip(least, draw(each(st.integers(0, 3))), strict=True)]
    groups, inner = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    options: dict[str, Any] = {"dilation": tuple(dilation), "padding": padding, "padding_mode": mode, "groups": groups}
    module = KINDS[spatial](groups * inner, groups, tuple(kernel), dtype=torch.float64, **options)
    return module, normal(draw(st.integers(1, 3)), groups * inner, *sizes)


@given(convolutions(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_lags_give_the_moment_of_the_patches(drawn: tuple[_ConvNd, Tensor], homogeneous: bool) -> None:
    module, x = drawn
    moment, number = patch_second_moment(x, module, homogeneous)
    close(moment, oracle(module, x, homogeneous))
    assert number == dense_kron._input_rows(module, x, len(x))[0][..., 0].numel()


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_border_is_seen(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with one product a lag, as if all kernel positions read the same pixels, the moment is another one."""
    module, x = nn.Conv2d(2, 1, 3, padding=1, padding_mode=mode, dtype=torch.float64), normal(3, 2, 6, 5)
    inside = torch.zeros_like(x)
    inside[..., 2:-2, 2:-2] = x[..., 2:-2, 2:-2]
    exact = Line.lag

    def whole(line: Line, steps: int) -> lags.Lag:
        lag = exact(line, steps)
        return replace(lag, cover=tuple((1.0,) * len(lag.spans) for _ in lag.cover))

    monkeypatch.setattr(Line, "lag", whole)
    want, found = oracle(module, x, True), patch_second_moment(x, module, True)[0]
    assert (found - want).norm() > 1e-2 * want.norm()
    close(patch_second_moment(inside, module, True)[0], oracle(module, inside, True))


@pytest.mark.parametrize("homogeneous", [False, True])
def test_pieces_of_examples_and_channels_have_the_same_sum(homogeneous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Conv2d(5, 1, (1, 2), padding=(0, 1), dtype=torch.float64), normal(7, 5, 6, 5)
    want = patch_second_moment(x, module, homogeneous)[0]
    monkeypatch.setattr(lags, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(lags, "_BUFFER", 2 * 5 * 2 * 2)
    assert lags.pieces(7, x.numel(), 100) == 7
    close(patch_second_moment(x, module, homogeneous)[0], want)
    close(want, oracle(module, x, homogeneous))


@pytest.mark.parametrize(
    "module", [nn.Conv2d(6, 2, (3, 2), padding=(1, 0), dilation=(1, 2), groups=2), nn.Conv1d(3, 2, 4, padding=2), nn.Conv3d(2, 1, 2)]
)
def test_the_operations_counted_are_those_made(module: _ConvNd, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3, module.in_channels, *(7, 6, 5)[: len(module.kernel_size)])
    made, product = [], Tensor.baddbmm_

    def counting(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        made.append(2 * left.numel() * right.shape[-1])
        return product(total, left, right)

    monkeypatch.setattr(Tensor, "baddbmm_", counting)
    patch_second_moment(x, module.double(), False)
    dims = conv.lines(module, x.shape[2:])
    assert by_lags(3, module.in_channels, module.groups, dims, 8).flops == sum(made) > 0
    rows = dense_kron._input_rows(module, x, 3)
    assert by_patches(3, module.in_channels, module.groups, dims, 8).flops == sum(2 * a[..., 1:].numel() * (a.shape[-1] - 1) for a in rows)


def seen_by(module: _ConvNd, x: Tensor) -> LayerColumns:
    return LayerColumns("conv", module, (x,), {}, (None,), True, len(x))


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, wide, tiny = Convolution(), nn.Conv2d(32, 1, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
    large, small = seen_by(wide, normal(8, 32, 12, 12)), seen_by(tiny, normal(1, 2, 4, 4))
    assert rule.input_moment(large, True) is not None and rule.input_moment(small, True) is None
    monkeypatch.setattr(conv, "by_lags", lambda *_: NOTHING)
    assert rule.input_moment(small, True) is not None
    monkeypatch.setattr(conv, "by_lags", lambda *_: EVERYTHING)
    assert rule.input_moment(large, True) is None


def test_a_rule_with_rows_of_its_own_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rolled(Convolution):
        def inputs(self, seen: LayerColumns) -> Tensor:
            return super().inputs(replace(seen, args=(seen.input.roll(1, -1),)))

    monkeypatch.setattr(conv, "by_lags", lambda *_: NOTHING)
    seen = seen_by(nn.Conv2d(2, 1, 3), normal(2, 2, 6, 6))
    assert Convolution().input_moment(seen, True) is not None and Rolled().input_moment(seen, True) is None


def test_the_cost_is_in_bytes_moved() -> None:
    assert Cost(16.0, 3.0, 0.0).total() == 4.0
    assert Cost(0.0, 0.0, 1.0).total("cuda") > Cost(0.0, 0.0, 1.0).total("cpu") > 0


def test_another_stride_takes_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "by_lags", lambda *_: NOTHING)
    assert Convolution().input_moment(seen_by(nn.Conv2d(2, 1, 3, stride=(1, 2), dtype=torch.float64), normal(2, 2, 6, 6)), True) is None
    assert Convolution().input_moment(seen_by(nn.Conv2d(2, 1, 3, dtype=torch.float64), normal(2, 2, 6, 6)), True) is not None


# --- in the representations


class Pyramid(nn.Module):
    """One convolution at two sizes, then grouped, dilated and padded ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.grouped = nn.Conv2d(2, 4, (2, 3), padding=1, dilation=(1, 2), groups=2, padding_mode="circular", bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.shared(nn.functional.avg_pool2d(x, 2)))
        return self.head(torch.tanh(self.grouped(x)).mean((2, 3)))


class Frames(nn.Module):
    """Two frames an example, flattened into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.flatten(0, 1))).mean((2, 3)).unflatten(0, x.shape[:2]).sum(1))


@contextmanager
def forced(cost: Cost | None) -> Iterator[None]:
    """None: by lags where images are large."""

    def count(examples: int, channels: int, groups: int, dims: list[Line], itemsize: int) -> Cost:
        return cost if cost is not None else NOTHING if dims[0].size > 4 else EVERYTHING

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "by_lags", count)
        yield


FOOF = KronIO(output="identity")
CELLS = [
    ("ggn", KronIO()), ("ggn", KronIO(packed="joint")), ("empirical_fisher", KronEigen()), ("input_second_moment", KronIO()),
    ("input_second_moment", FOOF),
]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "matrix", "repr"), [(Pyramid, *cell) for cell in CELLS] + [(Frames, m, r) for m, r in CELLS if not isinstance(r, KronEigen)]
)
def test_representations_are_the_same_by_either_way(build: Callable[[], nn.Module], matrix: str, repr: Any) -> None:
    shape = (4, 2, 6, 6) if build is Pyramid else (4, 2, 2, 4, 4)
    targets = labels(3, 4)
    targets[1] = -100
    found = []
    for cost in (EVERYTHING, NOTHING, None):
        with forced(cost):
            C = precond.curvature(
                seeded(build), nn.CrossEntropyLoss(), None, None, matrix=matrix, repr=repr, seed=3,
                batches=[(normal(*shape)[:1], targets[:1]), (normal(*shape)[1:], targets[1:])],
            )  # fmt: skip
        found.append(C.to_dense())
    close(found[1], found[0])
    close(found[2], found[0])


def test_k_fac_is_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no patch is formed: `Convolution.inputs` would raise."""
    model, x, y = seeded(Pyramid), normal(4, 2, 6, 6), labels(3, 4)
    expected = dense_derived.input_second_moment(model, nn.CrossEntropyLoss(), x, y)

    def patches(*_: Any) -> Tensor:
        raise AssertionError("patches were formed")

    monkeypatch.setattr(Convolution, "inputs", patches)
    for repr in (KronIO(), FOOF):
        with forced(NOTHING):
            close(precond.curvature(model, nn.CrossEntropyLoss(), x, y, matrix="input_second_moment", repr=repr).to_dense(), expected)
        with forced(EVERYTHING), pytest.raises(AssertionError, match="patches were formed"):
            precond.curvature(model, nn.CrossEntropyLoss(), x, y, matrix="input_second_moment", repr=repr)


def test_reduce_averages_patches_first() -> None:
    """The formula is of "expand"; "reduce" is not changed by it, and is another matrix."""
    model, x, y = seeded(Pyramid), normal(4, 2, 6, 6), labels(3, 4)
    with forced(NOTHING):
        reduced, expanded = (
            precond.curvature(model, nn.CrossEntropyLoss(), x, y, matrix="input_second_moment", repr=KronIO(sharing=s)).to_dense()
            for s in ("reduce", "expand")
        )
    close(reduced, dense_derived.input_second_moment(model, nn.CrossEntropyLoss(), x, y, reduce=True))
    assert (reduced - expanded).norm() > 1e-3 * expanded.norm()


def test_one_call_for_all_examples_is_refused_by_either_way() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(2, 3)
            self.register_buffer("grid", normal(1, 2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.conv(self.grid).mean((0, 2, 3))

    for cost in (NOTHING, EVERYTHING):
        with forced(cost), pytest.raises(precond.ObservationError, match="rows="):
            precond.curvature(seeded(Alone), nn.CrossEntropyLoss(), normal(4, 2), labels(3, 4), matrix="ggn", repr="kron_io")
