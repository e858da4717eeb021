"""Claims about the generic layer rule, and about which rows are one example's (rule 7), float64 at 1e-10.

- Gradients by column and example are those of each example alone, for LSTM (batch first or second, several layers, both directions, an
  initial state, columns at the last states too), GRU, RNN, MultiheadAttention (batch first or second, masks), and a user's module with
  bare parameters, keyword and constant arguments; `total` is autograd's; a slice of examples is a slice.
- A module that vmap takes is mapped, one that it does not take (GRU) is looped over, and both ways give the same.
- `rows="flattened"` and `"second"` say how a layer enumerates its examples; without them a layer whose leading size is not the batch is
  refused by name for what needs examples, and not for K-FAC expand.
- Refused by name: dropout, batch statistics inside (running or not), an output or an input that is not by example.
- How many examples are taken at a time changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from layer_calls import Tensors, by_example, call, trainable, whole
from nets import CASES, labels, normal, seeded
from precond import blocks
from precond.layers import GENERIC, resolve_rule
from precond.observe import LayerColumns, recorder

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


class Own(nn.Module):
    """Bare parameters, a keyword argument by example, and one that is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.gates = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])

    def forward(self, x: Tensor, power: float, *, weight: Tensor, shared: Tensor | None = None) -> Tensor:
        y = (x @ self.matrix).tanh() * weight[:, None] ** power + self.gates[0]
        return y * self.gates[1] if shared is None else y * (self.gates[1] + shared)


def recurrent(kind: type[nn.RNNBase], first: bool, **options: Any) -> LayerColumns:
    shape = (4, 3, 2) if first else (3, 4, 2)
    return call(seeded(lambda: kind(2, 3, batch_first=first, **options)), normal(*shape), batch=4)


def stateful() -> LayerColumns:
    state = (normal(2, 4, 3, seed=5), normal(2, 4, 3, seed=6))
    return call(seeded(lambda: nn.LSTM(2, 3, num_layers=2, batch_first=True)), normal(4, 3, 2), state, batch=4, reached=(0, 1, 2))


def keyword_state(kind: type[nn.RNNBase]) -> LayerColumns:
    state = normal(1, 4, 3, seed=5)
    pair = (state, normal(1, 4, 3, seed=6)) if kind is nn.LSTM else state
    return call(seeded(lambda: kind(2, 3)), normal(3, 4, 2), batch=4, hx=pair)


def cell(kind: type[nn.RNNCellBase], keyword: bool = False) -> LayerColumns:
    """One step of a recurrent cell, from a state."""
    state: Any = normal(4, 3, seed=5)
    if kind is nn.LSTMCell:
        state = (state, normal(4, 3, seed=6))
    build = lambda: kind(2, 3)  # noqa: E731
    reached = (0, 1) if kind is nn.LSTMCell else (0,)
    if keyword:
        return call(seeded(build), normal(4, 2), batch=4, reached=reached, hx=state)
    return call(seeded(build), normal(4, 2), state, batch=4, reached=reached)


def pick_state(name: str, argument: Any, i: int) -> Any:
    return argument.narrow(0, i, 1) if isinstance(argument, Tensor) else tuple(state.narrow(0, i, 1) for state in argument)


def pick_recurrent(dim: int) -> Callable[[str, Any, int], Any]:
    def pick(name: str, argument: Any, i: int) -> Any:
        if not isinstance(argument, Tensor):
            return tuple(state.narrow(1, i, 1) for state in argument)
        return argument.narrow(1 if name == "hx" else dim, i, 1)

    return pick


def attention(first: bool, **options: Tensor) -> LayerColumns:
    x = normal(4, 3, 4) if first else normal(3, 4, 4)
    return call(seeded(lambda: nn.MultiheadAttention(4, 2, batch_first=first)), x, x, x, batch=4, need_weights=False, **options)


def pick_attention(dim: int) -> Callable[[str, Any, int], Any]:
    def pick(name: str, argument: Any, i: int) -> Any:
        if not isinstance(argument, Tensor) or name == "attn_mask":
            return argument
        return argument.narrow(0 if name == "key_padding_mask" else dim, i, 1)

    return pick


def own(**shared: Tensor) -> LayerColumns:
    return call(seeded(Own), normal(5, 4), 2.0, weight=normal(5, seed=3).abs(), **shared)


def pick_own(name: str, argument: Any, i: int) -> Any:
    return argument if not isinstance(argument, Tensor) or name == "shared" else argument.narrow(0, i, 1)


_CAUSAL = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
_PADDED = torch.tensor([[False, False, True], [False, True, True], [False, False, False], [False, False, True]])
LAYERS: dict[str, tuple[Callable[[], LayerColumns], Callable[[LayerColumns], Tensors]]] = {
    "lstm": (lambda: recurrent(nn.LSTM, True), by_example),
    "lstm-second": (lambda: recurrent(nn.LSTM, False), lambda s: by_example(s, 1)),
    "lstm-deep": (lambda: recurrent(nn.LSTM, True, num_layers=2, bidirectional=True, bias=False), by_example),
    "lstm-state": (stateful, lambda s: by_example(s, pick=pick_recurrent(0), dims=(0, 1, 1))),
    "lstm-keyword": (lambda: keyword_state(nn.LSTM), lambda s: by_example(s, pick=pick_recurrent(1), dims=(1,))),
    "gru-keyword": (lambda: keyword_state(nn.GRU), lambda s: by_example(s, pick=pick_recurrent(1), dims=(1,))),
    "gru": (lambda: recurrent(nn.GRU, True), by_example),
    "gru-second": (lambda: recurrent(nn.GRU, False), lambda s: by_example(s, 1)),
    "rnn": (lambda: recurrent(nn.RNN, True), by_example),
    "lstm-cell": (lambda: cell(nn.LSTMCell), lambda s: by_example(s, pick=pick_state, dims=(0, 0))),
    "lstm-cell-keyword": (lambda: cell(nn.LSTMCell, True), lambda s: by_example(s, pick=pick_state, dims=(0, 0))),
    "gru-cell": (lambda: cell(nn.GRUCell), lambda s: by_example(s, pick=pick_state)),
    "mha": (lambda: attention(True), lambda s: by_example(s, pick=pick_attention(0))),
    "mha-second": (lambda: attention(False), lambda s: by_example(s, pick=pick_attention(1), dims=(1,))),
    "mha-causal": (lambda: attention(True, attn_mask=_CAUSAL), lambda s: by_example(s, pick=pick_attention(0))),
    "mha-padded": (lambda: attention(True, key_padding_mask=_PADDED), lambda s: by_example(s, pick=pick_attention(0))),
    "own": (own, lambda s: by_example(s, pick=pick_own)),
    "own-shared": (lambda: own(shared=normal(3, seed=4)), lambda s: by_example(s, pick=pick_own)),
}


def gradients(seen: LayerColumns, examples: slice = slice(None)) -> Tensors:
    return GENERIC.gradients(seen, list(trainable(seen.module)), examples)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_each_example_alone(name: str) -> None:
    build, reference = LAYERS[name]
    seen = build()
    assert (resolve_rule(seen.module) is GENERIC) != isinstance(seen.module, nn.MultiheadAttention)
    want = reference(seen)
    close(gradients(seen), want)
    close(gradients(seen, slice(1, 3)), {n: g[:, 1:3] for n, g in want.items()})
    close(GENERIC.total(seen, list(trainable(seen.module))), whole(seen))
    assert all(g.abs().max() > 1e-3 for n, g in want.items() if "in_proj_bias" not in n)


@pytest.mark.parametrize("name", ["lstm-second", "mha", "own"])
def test_mapping_and_looping_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = LAYERS[name][0]()
    mapped = gradients(seen)

    def cannot(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(torch.func, "vmap", cannot)
    close(gradients(seen), mapped)


class Through(nn.Module):
    """Runs a layer on another layout of its input, and averages what comes out over the positions."""

    def __init__(self, layer: nn.Module, layout: str) -> None:
        super().__init__()
        self.layer, self.head, self.layout = layer, nn.Linear(4, 3), layout

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "flattened":
            y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            y = self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(y.tanh().mean(1))


SHARED = {
    "linear": (lambda: nn.Linear(4, 4), False),
    "norm": (lambda: nn.LayerNorm(4), False),
    "embedding": (lambda: nn.Embedding(5, 4), True),
}


@pytest.mark.parametrize("repr", ["full", "layer", "unit", "diagonal"])
@pytest.mark.parametrize("layout", ["flattened", "second"])
@pytest.mark.parametrize("kind", SHARED)
def test_rows_say_how_a_layer_enumerates_its_examples(kind: str, layout: str, repr: str) -> None:
    build, discrete = SHARED[kind]
    model, criterion = seeded(lambda: Through(build(), layout)), nn.CrossEntropyLoss()
    x, y = labels(5, 4, 3) if discrete else normal(4, 3, 4), labels(3, 4)
    C = precond.curvature(model, criterion, x, y, matrix="ggn", repr=repr, rows={"layer": layout})
    M = dense.ggn(model, criterion, x, y)
    keep = {"full": M, "layer": dense.project_layer(M, model), "unit": dense.project_unit(M, model), "diagonal": dense.project_diagonal(M)}
    close(C.to_dense(), keep[repr])
    with pytest.raises(
        precond.ObservationError, match=r"layer 'layer' has (12|3) leading rows for a batch of 4.*rows={'layer': 'flattened'}"
    ):
        precond.curvature(model, criterion, x, y, matrix="ggn", repr=repr)


def test_kfac_expand_needs_no_examples_and_reduce_does() -> None:
    model, x, y = seeded(lambda: Through(nn.Linear(4, 4), "flattened")), normal(4, 3, 4), labels(3, 4)

    def kron(sharing: Any, rows: dict[str, str] | None) -> Tensor:
        repr = precond.representations.KronIO(sharing=sharing)
        return precond.curvature(model, nn.CrossEntropyLoss(), x, y, matrix="ggn", repr=repr, rows=rows).to_dense()

    close(kron("expand", None), kron("expand", {"layer": "flattened"}))
    with pytest.raises(precond.ObservationError, match="12 leading rows for a batch of 4"):
        kron("reduce", None)
    assert (kron("reduce", {"layer": "flattened"}) - kron("expand", None)).norm() > 1e-3


class Inside(nn.Module):
    """A bare parameter beside a child."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child, self.scale = child, nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.scale


class Transposed(nn.Module):
    """Gives what it has the wrong way round."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).T


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Inside(nn.Dropout(0.5)), r"'' \(Inside\).*dropout \(child, rate 0.5\).*other masks"),
        (Inside(nn.BatchNorm1d(3)), r"BatchNorm1d 'child' .*mixes the examples"),
        (Inside(nn.BatchNorm1d(3, track_running_stats=False)).eval(), r"BatchNorm1d 'child' .*mixes the examples"),
        (nn.Sequential(Transposed(), nn.Flatten(), nn.Linear(4, 3)), r"Transposed has shape \(3, 4\) for a batch of 4 examples"),
    ],
)
def test_what_cannot_be_run_by_example_is_refused_by_name(model: nn.Module, message: str) -> None:
    x, target = normal(4, 3), labels(3, 3 if isinstance(model, nn.Sequential) else 4)
    with pytest.raises(precond.ObservationError, match=message):
        precond.curvature(model.double(), nn.CrossEntropyLoss(), x, target, matrix="empirical_fisher", repr="layer")


def test_dropout_of_a_recurrent_module_is_refused_in_training_mode_only() -> None:
    model = nn.Sequential(nn.LSTM(3, 3, num_layers=2, dropout=0.5, batch_first=True))
    seen = call(model[0].double(), normal(4, 2, 3), batch=4)
    with pytest.raises(precond.ObservationError, match=r"dropout \(LSTM, rate 0.5\)"):
        gradients(seen)
    seen = call(model[0].eval(), normal(4, 2, 3), batch=4)
    close(gradients(seen), by_example(seen))


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer", "mha", "lstm", "reused"])
def test_the_number_of_examples_at_a_time_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]

    def curve() -> Tensor:
        return precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix="ggn", repr="layer").to_dense()

    want = curve()
    monkeypatch.setattr(blocks, "_CHUNK_ELEMENTS", 1)
    close(curve(), want)


class Steps(nn.Module):
    """Recurrent cells, called once a step: the first time without a state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(2, 2), nn.GRUCell(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, other = None, None
        for step in x.unbind(1):
            state = self.lstm(step, state)
            other = self.gru(state[0], other)
        return self.head(other)


class Chained(nn.Module):
    """Two outputs, the second made from the first, in a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.gain = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = x * self.scale
        return first, [first.tanh() * self.gain, first]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Chained(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, (second, again) = self.inner(x.sum(1))
        return self.head(first * first + second + again.sin())


@pytest.mark.parametrize("kind", [Steps, Both])
@pytest.mark.parametrize("repr", ["full", "full_gram", "layer", "diagonal"])
def test_outputs_that_are_made_from_one_another(repr: str, kind: type[nn.Module]) -> None:
    model, criterion, x, y = seeded(kind), nn.CrossEntropyLoss(), normal(3, 3, 2), labels(2, 3)
    C = precond.curvature(model, criterion, x, y, matrix="ggn", repr=repr)
    M = dense.ggn(model, criterion, x, y)
    keep = {"full": M, "full_gram": M, "layer": dense.project_layer(M, model), "diagonal": dense.project_diagonal(M)}
    close(C.to_dense(), keep[repr])
    assert (M - keep["layer"]).abs().max() > 1e-4  # control: the calls of one step are not those of another
    assert (M - dense.ggn(model, criterion, x[:, :2], y)).abs().max() > 1e-4


def test_outputs_that_are_not_told_apart_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: as handed out by the module, the gradient at the first output is also that of the second, and the self-check says so."""
    monkeypatch.setattr(recorder, "apart", lambda output: output)
    model, data = seeded(Both), (nn.CrossEntropyLoss(), normal(3, 3, 2), labels(2, 3))
    with pytest.raises(precond.ObservationError, match=r"gradient of 'inner\.scale' is not what the calls of its layer explain"):
        precond.curvature(model, *data, matrix="ggn", repr="layer")
    C = precond.curvature(model, *data, matrix="ggn", repr="layer", self_check=False)
    assert (C.to_dense() - dense.project_layer(dense.ggn(model, *data), model)).abs().max() > 1e-4


@pytest.mark.parametrize("repr", precond.representations.names())
def test_a_parameter_without_entries_is_in_no_block(repr: str) -> None:
    def build(empty: bool) -> nn.Module:
        model = seeded(lambda: nn.Sequential(nn.Linear(3, 2)))
        if empty:
            model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
        return model

    data = (nn.CrossEntropyLoss(), normal(4, 3), labels(2, 4))
    with_it, without = (precond.curvature(build(empty), *data, matrix="ggn", repr=repr).to_dense() for empty in (True, False))
    assert without.abs().max() > 1e-3
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
