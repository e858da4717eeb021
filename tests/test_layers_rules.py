"""Claims about how a module finds its rule, what is refused, and what a rule leaves behind.

- `register` takes a function of (module, a, g), in either layout of rows, mapped over columns or looped; a Rule; and the full name of a class
  that is not imported. A gradient that is missing or has a wrong shape is refused by name. A subclass with a `forward` of its own, or
  parameters beside weight and bias, goes through the generic rule.
- Attention reads its masks, boolean or numbers, by head or not, with and without the causal hint, as torch does, also for keys that it adds.
- Dropout of attention weights draws the mask of the pass again. Refused by name: a mask that cannot be, embeddings that are
  silently wrong, inputs without a batch.
- A weight that is made from other tensors leaves no trace: no buffer, mode or attribute of the module is different afterwards, in training
  mode either.
- A fallback is taken block by block: what a representation hosts of a module it keeps, and strict refuses the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from layer_calls import by_example, call, trainable, whole
from layer_cases import LAYERS, Attends, Conv1D
from nets import Case, labels, normal, seeded
from precond.layers import GENERIC, Rule, register, resolve_rule
from precond.layers.generic import Generic
from precond.observe import LayerColumns

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Deeper(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    from precond.layers import registration

    monkeypatch.setattr(registration, "_RULES", dict(registration._RULES))


def scaled(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    return {"scale": (g * a).flatten(1, -2).sum(1) if a.dim() > 2 else g * a}


def looping(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    assert float(g.abs().sum()) > 0  # a number of a tensor: vmap does not allow it
    return scaled(module, a, g)


@pytest.mark.parametrize("function", [scaled, looping])
def test_a_function_is_a_rule(function: Any) -> None:
    assert register(Scaled)(function) is function
    seen = call(seeded(Scaled), normal(3, 2, 4))
    rule = resolve_rule(seen.module)
    assert rule is not GENERIC and resolve_rule(Deeper()) is GENERIC
    want = by_example(seen)
    close(rule.gradients(seen, ["scale"], slice(None)), want)
    close(rule.gradients(seen, ["scale"], slice(1, 3)), {"scale": want["scale"][:, 1:3]})
    second = LayerColumns("s", seen.module, (seen.input.transpose(0, 1),), {}, (seen.grads[0].transpose(1, 2),), True, 3, "second")
    close(rule.gradients(second, ["scale"], slice(None)), want)


@pytest.mark.parametrize(
    ("given", "message"), [({}, "nothing for its parameter 'scale'"), ({"scale": torch.zeros(4)}, r"a tensor of shape \(4,\).*\(3, 4\)")]
)
def test_a_function_that_gives_something_else_is_refused_by_name(given: dict[str, Tensor], message: str) -> None:
    register(Scaled)(lambda module, a, g: given)
    with pytest.raises(ValueError, match=f"the rule registered for Scaled gave {message}"):
        precond.curvature(nn.Sequential(Scaled()), nn.CrossEntropyLoss(), normal(3, 4).float(), labels(4, 3), matrix="ggn", repr="layer")


class Elsewhere(Scaled):
    pass


def test_a_class_that_is_not_imported_is_known_by_its_name() -> None:
    @register(f"{__name__}.Elsewhere")
    class ByName(Rule):
        def gradients(self, seen: LayerColumns, names: Any, examples: slice) -> dict[str, Tensor]:
            raise NotImplementedError

        def knows(self, module: nn.Module) -> bool:
            return True

    assert isinstance(resolve_rule(Elsewhere()), ByName)
    assert resolve_rule(Scaled()) is GENERIC
    assert resolve_rule(Conv1D(2, 3)) is not GENERIC


class Extra(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.ones(4))


def test_a_parameter_that_the_family_does_not_know_makes_a_module_generic() -> None:
    assert resolve_rule(Extra()) is GENERIC
    attention = nn.MultiheadAttention(4, 2)
    assert resolve_rule(attention) is not GENERIC
    nn.utils.parametrizations.weight_norm(attention.out_proj)
    assert resolve_rule(attention) is GENERIC


@pytest.mark.parametrize("first", [True, False])
def test_attention_with_a_parametrized_projection_is_exact(first: bool) -> None:
    def build() -> nn.Module:
        module = nn.MultiheadAttention(4, 2, batch_first=first)
        nn.utils.parametrizations.weight_norm(module.out_proj)
        return module

    x = normal(3, 2, 4) if first else normal(2, 3, 4)
    seen = call(seeded(build), x, x, x, batch=3, need_weights=False)
    pick = lambda name, a, i: a.narrow(0 if first else 1, i, 1) if isinstance(a, Tensor) else a  # noqa: E731
    close(GENERIC.gradients(seen, list(trainable(seen.module)), slice(None)), by_example(seen, 0 if first else 1, pick=pick))


_CAUSAL = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
_PADDED = torch.tensor([[False, False, True], [False, True, False]])
MASKS = {
    "causal": {"attn_mask": _CAUSAL, "is_causal": True, "need_weights": False},
    "causal-weights": {"attn_mask": _CAUSAL, "is_causal": True},
    "numbers": {"attn_mask": normal(3, 3), "key_padding_mask": normal(2, 3)},
    "heads": {"attn_mask": normal(4, 3, 3), "key_padding_mask": normal(2, 3)},
    "padded": {"attn_mask": _CAUSAL, "key_padding_mask": _PADDED, "need_weights": False},
    "hint-padded": {"attn_mask": _CAUSAL, "key_padding_mask": _PADDED, "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_attention_reads_masks_as_torch_does(masks: dict[str, Any], extra: bool) -> None:
    module, x = seeded(lambda: nn.MultiheadAttention(4, 2, add_bias_kv=extra, add_zero_attn=extra)), normal(3, 2, 4)
    seen = call(module, x, x, x, batch=2, reached=range(2 if masks.get("need_weights", True) else 1), **masks)

    def pick(name: str, argument: Any, i: int) -> Any:
        if name == "attn_mask":
            return argument.narrow(0, 2 * i, 2) if argument.dim() == 3 else argument
        return argument.narrow(0 if name == "key_padding_mask" else 1, i, 1) if isinstance(argument, Tensor) else argument

    close(resolve_rule(module).gradients(seen, list(trainable(module)), slice(None)), by_example(seen, pick=pick, dims=(1, 0)[: len(seen.grads)]))
    close(resolve_rule(module).total(seen, list(trainable(module))), whole(seen))


def refused(model: nn.Module, x: Tensor, message: str) -> None:
    with pytest.raises(precond.ObservationError, match=message):
        precond.curvature(seeded(lambda: model), nn.CrossEntropyLoss(), x, labels(2, len(x)), matrix="ggn", repr="layer")


class Encoder(nn.Module):
    """Two default encoder layers, dropout everywhere, and one attention that returns its weights."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 5, batch_first=batch_first, dropout=0.3) for _ in range(2)])
        self.last = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=batch_first)
        self.head, self.batch_first = nn.Linear(4, 2), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        x = self.last(x, x, x)[0] + self.last(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1 if self.batch_first else 0))


def one_pass(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """(N C, P): the rows of S^T J of one forward pass, masks and all, by plain autograd."""
    torch.manual_seed(seed)
    output, params = model(x), list(model.parameters())
    p = output.detach().softmax(1)
    rows = []
    for n in range(len(x)):
        for c in range(output.shape[1]):
            cotangent = torch.zeros_like(output)
            cotangent[n] = -p[n, c].sqrt() * p[n]
            cotangent[n, c] += p[n, c].sqrt()
            found = torch.autograd.grad(output, params, cotangent, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([(torch.zeros_like(q) if g is None else g).flatten() for q, g in zip(params, found, strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_of_attention_weights_draws_the_masks_of_the_pass(batch_first: bool) -> None:
    model, x, y = seeded(lambda: Encoder(batch_first)), normal(3, 5, 4), labels(2, 3)
    J = one_pass(model, x, seed=3)
    torch.manual_seed(3)
    kinds = {} if batch_first else {"rows": {"layers.*.linear*": "second", "layers.*.norm*": "second"}}
    C = precond.curvature(model, nn.CrossEntropyLoss(), x, y, matrix="ggn", repr="full", seed=0, **kinds).to_dense()
    torch.testing.assert_close(C, J.T @ J / 3, rtol=1e-10, atol=1e-12)
    other = one_pass(model, x, seed=4)
    assert (C - other.T @ other / 3).norm() > 1e-2 * C.norm()  # other masks are another matrix


def test_a_mask_that_cannot_be_drawn_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fused kernel does: it draws in another order."""
    monkeypatch.setattr("precond.layers.attended.drawing_again", lambda states, device: torch.random.fork_rng(devices=[]))
    refused(nn.Sequential(Attends(batch_first=True, dropout=0.5), nn.Flatten(), nn.Linear(12, 2)), normal(3, 3, 4), "in a fused kernel")


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq", "max_norm"])
def test_a_bag_that_would_be_silently_wrong_is_refused_by_name(option: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 3, mode="sum", **{option: True}), nn.Linear(3, 2))
    refused(model, labels(5, 3, 4), rf"layer '0' \(EmbeddingBag\) is refused: {option}.*overrides={{'0': None}}")


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(3, 2, 2), normal(3, 4)), (nn.ConvTranspose2d(3, 2, 2), normal(3, 4, 4)), (nn.InstanceNorm1d(3, affine=True), normal(3, 4)),
    ],
)  # fmt: skip
def test_an_input_without_a_batch_is_refused_where_channels_would_pass_for_examples(layer: nn.Module, x: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).flatten(1).mean(0, keepdim=True).expand(len(x), -1)

    refused(Model(), x, rf"layer 'layer' \({type(layer).__name__}\) takes a \d-dimensional input, without a batch in front")


@pytest.mark.parametrize("module", [nn.GRU(4, 2), nn.MultiheadAttention(4, 2)])
def test_a_single_sequence_is_refused(module: nn.Module) -> None:
    x = normal(3, 4)
    args = (x,) if isinstance(module, nn.GRU) else (x, x, x)
    seen = call(module.double(), *args)
    with pytest.raises(precond.ObservationError, match="without a batch"):
        resolve_rule(module).gradients(seen, list(trainable(module)), slice(None))


@pytest.mark.parametrize("name", ["weight-norm", "weight-norm-hook", "spectral-norm", "spectral-norm-hook"])
def test_a_weight_that_is_made_leaves_no_trace(name: str) -> None:
    case: Case = LAYERS[name]
    seen = call(case.make()[0], case.inputs)
    inside = {n: b.clone() for n, b in seen.module.named_buffers()}
    modes, kept = [m.training for m in seen.module.modules()], seen.module.__dict__.get("weight")
    want = seen.module(case.inputs) if not inside else None
    rule = resolve_rule(seen.module)
    assert isinstance(rule, Generic)
    rule.gradients(seen, list(trainable(seen.module)), slice(None))
    assert all(torch.equal(b, inside[n]) for n, b in seen.module.named_buffers())
    assert modes == [m.training for m in seen.module.modules()] and all(modes)
    assert type(seen.module.__dict__.get("weight")) is type(kept)
    if want is not None:
        close(seen.module(case.inputs), want)


def test_a_fallback_is_taken_block_by_block() -> None:
    case = LAYERS["separate"]
    C = precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix="ggn", repr="kron_io")
    kinds = {name: type(block).__name__ for name, block in C.blocks.items()}
    projections = {f"0.attention.{n}_proj": "Kronecker" for n in ("q", "k", "v", "out")}
    assert kinds == {"0.attention.in_proj_bias": "Diagonal", "3": "Kronecker", **projections}
    with pytest.raises(precond.InvalidCombination, match=r"'kron_io' cannot host layer '0\.attention'"):
        precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix="ggn", repr="kron_io", strict=True)
