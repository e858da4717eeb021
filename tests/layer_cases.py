"""Small networks around one layer each: the cases that the tests of layer rules walk.

Claims: `LAYERS[name]` is a case whose network is the layer under test (named "0" or "layer"), a tanh and a Linear on all of its output;
float64, three examples, nothing random, scales and shifts of norms away from 1 and 0. `rebuilt` cases have a weight that is made from
other tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from nets import Case, labels, normal, seeded

N = 3
CE = nn.CrossEntropyLoss()


class Conv1D(nn.Module):
    """What `transformers` calls so: a Linear layer whose weight is stored (in, out)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


Conv1D.__module__ = "transformers.pytorch_utils"


class LoRA(nn.Module):
    """A frozen Linear and two trained ones of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 3), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Bare(nn.Module):
    """Parameters of its own, in a list and in a dictionary too, and one that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.power = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.tensor(0.7))
        self.gates = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.named = nn.ParameterDict({"shift": torch.randn(3)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix * self.power) * self.gates[0] * self.gates[1] + self.named["shift"]


class Bags(nn.Module):
    """An `nn.EmbeddingBag` on the rows of (N, R) indices: as they are, one after another with offsets, or weighted."""

    def __init__(self, form: str, **options: Any) -> None:
        super().__init__()
        self.form, self.bag = form, nn.EmbeddingBag(5, 3, **options)

    def forward(self, index: Tensor) -> Tensor:
        if self.form == "rows":
            return self.bag(index)
        if self.form == "weighted":
            return self.bag(index, per_sample_weights=0.1 * index.double() + 1)
        sizes = torch.arange(len(index)) % index.shape[1]  # the first bag is empty
        flat = torch.cat([row[:size] for row, size in zip(index, sizes, strict=True)])
        ends = sizes.cumsum(0)
        return self.bag(flat, ends - sizes) if self.form == "offsets" else self.bag(flat, torch.cat([ends[:1] * 0, ends]))


class Attends(nn.Module):
    """An `nn.MultiheadAttention` on parts of (N, T, 4): query, key and value are `slices` of positions and `widths` of features."""

    def __init__(self, slices: tuple[slice, ...] = (slice(None),) * 3, weights: bool = False, call: Any = None, **options: Any) -> None:
        super().__init__()
        self.slices, self.weights, self.call = slices, weights, call or {}
        self.widths = (4, options.get("kdim") or 4, options.get("vdim") or 4)
        self.attention = nn.MultiheadAttention(4, 2, **options)
        if self.attention.in_proj_bias is not None:
            nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        same = len(set(map(str, self.slices))) == 1 and self.widths == (4, 4, 4)
        parts = [x] * 3 if same else [x[:, s, :w] for s, w in zip(self.slices, self.widths, strict=True)]
        if not self.attention.batch_first:
            parts = [parts[0].transpose(0, 1)] * 3 if same else [p.transpose(0, 1) for p in parts]
        y, weights = self.attention(*parts, **self.call)
        y = y if self.attention.batch_first else y.transpose(0, 1)
        return torch.cat([y.flatten(1), weights.flatten(1)], 1) if self.weights else y


class Last(nn.Module):
    """A recurrent module's outputs at all steps."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0]
        return y if self.layer.batch_first else y.transpose(0, 1)


class Pair(nn.Module):
    """A `nn.Bilinear` of the two halves of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*x.chunk(2, -1))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.T


class FrozenIn(nn.Module):
    """Attention of which only biases and the output weight are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attends(batch_first=True)
        self.layer.attention.in_proj_weight.requires_grad_(False)
        self.layer.attention.out_proj.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def affine(module: nn.Module) -> nn.Module:
    """Scales and shifts away from 1 and 0, and running statistics where they are kept."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if "num_batches" not in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def running(module: nn.Module) -> nn.Module:
    return affine(module).eval()


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def network(build: Callable[[], nn.Module], x: Tensor) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = build().double()
        mode = {m: m.training for m in layer.modules()}
        with torch.no_grad():
            width = layer.eval()(x)[0].numel()
        for m, training in mode.items():
            m.training = training
        return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2))

    return lambda: seeded(make)


def _one(name: str, build: Callable[[], nn.Module], x: Tensor) -> Case:
    return Case(name, network(build, x), CE, x, labels(2, N))


_LINE, _PLANE, _SPACE = normal(N, 4, 5), normal(N, 2, 4, 3), normal(N, 2, 3, 2, 3)
_INDEX, _STEPS, _TOKENS = labels(5, N, 4), normal(N, 3, 2), normal(N, 3, 4)
_SHORT, _LONG = slice(0, 1), slice(1, 3)
_PADDED = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])
_CAUSAL = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)

CONVOLUTIONS = [
    _one("conv1d", lambda: nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=2), _LINE),
    _one("conv1d-reflect", lambda: nn.Conv1d(4, 2, 3, padding=2, padding_mode="reflect", dilation=2), _LINE),
    _one("conv1d-same", lambda: nn.Conv1d(4, 2, 2, padding="same", padding_mode="replicate"), _LINE),
    _one("conv1d-valid", lambda: nn.Conv1d(4, 2, 2, padding="valid", dilation=2, bias=False), _LINE),
    _one("conv1d-circular", lambda: nn.Conv1d(4, 2, 3, padding=1, padding_mode="circular"), _LINE),
    _one("conv2d-replicate", lambda: nn.Conv2d(2, 2, (3, 2), padding=(2, 1), padding_mode="replicate"), _PLANE),
    _one("conv3d", lambda: nn.Conv3d(2, 2, 2, stride=(2, 1, 2), padding=(1, 0, 1), groups=2), _SPACE),
    _one("conv3d-circular", lambda: nn.Conv3d(2, 1, (2, 1, 2), padding="same", padding_mode="circular"), _SPACE),
    _one("conv3d-reflect", lambda: nn.Conv3d(2, 1, (2, 1, 2), padding=(1, 0, 1), padding_mode="reflect", bias=False), _SPACE),
    _one("conv3d-replicate", lambda: nn.Conv3d(2, 1, 2, padding=1, dilation=2, padding_mode="replicate"), _SPACE),
]
TRANSPOSED = [
    _one("transposed1d", lambda: nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2), _LINE),
    _one("transposed1d-dilated", lambda: nn.ConvTranspose1d(4, 2, 2, dilation=3, output_padding=2, bias=False), _LINE),
    _one("transposed1d-one", lambda: nn.ConvTranspose1d(4, 2, 3), _LINE[..., :1]),
    _one("transposed2d", lambda: nn.ConvTranspose2d(2, 2, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), _PLANE),
    _one(
        "transposed3d", lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), padding=(1, 0, 1), output_padding=(0, 1, 0), groups=2), _SPACE
    ),
]
NORMS = [
    _one("layernorm", lambda: affine(nn.LayerNorm((4, 5))), _LINE),
    _one("rmsnorm", lambda: affine(nn.RMSNorm(5)), _LINE),
    _one("groupnorm", lambda: affine(nn.GroupNorm(2, 4)), _LINE),
    _one("groupnorm-vector", lambda: affine(nn.GroupNorm(2, 4)), _LINE[..., 0]),
    _one("instancenorm1d", lambda: affine(nn.InstanceNorm1d(4, affine=True)), _LINE),
    _one("instancenorm2d", lambda: affine(nn.InstanceNorm2d(2, affine=True, track_running_stats=True)), _PLANE),
    _one("instancenorm3d-running", lambda: running(nn.InstanceNorm3d(2, affine=True, track_running_stats=True)), _SPACE),
    _one("batchnorm1d", lambda: running(nn.BatchNorm1d(4)), _LINE),
    _one("batchnorm2d", lambda: running(nn.BatchNorm2d(2)), _PLANE),
    _one("batchnorm3d", lambda: running(nn.BatchNorm3d(2)), _SPACE),
]
EMBEDDINGS = [
    _one("embedding", lambda: nn.Embedding(5, 3, padding_idx=int(_INDEX[0, 0])), _INDEX),
    _one("bag-sum", lambda: Bags("rows", mode="sum"), _INDEX),
    _one("bag-mean", lambda: Bags("rows", mode="mean", padding_idx=int(_INDEX[0, 0])), _INDEX),
    _one("bag-max", lambda: Bags("rows", mode="max", padding_idx=int(_INDEX[0, 0])), _INDEX),
    _one("bag-weighted", lambda: Bags("weighted", mode="sum"), _INDEX),
    _one("bag-offsets", lambda: Bags("offsets", mode="mean"), _INDEX),
    _one("bag-offsets-max", lambda: Bags("offsets", mode="max"), _INDEX),
    _one("bag-last", lambda: Bags("last", mode="sum", include_last_offset=True), _INDEX),
]
ATTENTION = [
    _one("self", lambda: Attends(batch_first=True), _TOKENS),
    _one("self-second", lambda: Attends(call={"attn_mask": _CAUSAL, "need_weights": False, "is_causal": True}), _TOKENS),
    _one("cross", lambda: Attends((_LONG, slice(0, 2), slice(0, 2)), batch_first=True, bias=False), _TOKENS),
    _one("cross-ragged", lambda: Attends((_SHORT, _LONG, _LONG), weights=True), _TOKENS),
    _one("separate", lambda: Attends((slice(None), _LONG, _LONG), kdim=2, vdim=3, batch_first=True), _TOKENS),
    _one("extra", lambda: Attends(add_bias_kv=True, add_zero_attn=True, batch_first=True, call={"key_padding_mask": _PADDED}), _TOKENS),
    _one("weights", lambda: Attends(weights=True, batch_first=True, call={"average_attn_weights": False, "attn_mask": _CAUSAL}), _TOKENS),
    _one("frozen-in", FrozenIn, _TOKENS),
]
RECURRENT = [
    _one("lstm", lambda: Last(nn.LSTM(2, 3, num_layers=2, proj_size=2, bidirectional=True, batch_first=True)), _STEPS),
    _one("gru", lambda: Last(nn.GRU(2, 2, num_layers=2)), _STEPS),
    _one("rnn", lambda: Last(nn.RNN(2, 2, nonlinearity="relu", bidirectional=True, bias=False)), _STEPS),
]
OTHERS = [
    _one("hf", lambda: Conv1D(3, 4), _TOKENS),
    _one("hf-vector", lambda: Conv1D(3, 4), _TOKENS[:, 0]),
    _one("lora", LoRA, _TOKENS),
    _one("bare", Bare, _TOKENS[:, 0]),
    _one("prelu", lambda: nn.PReLU(4), _LINE),
    _one("bilinear", Pair, _TOKENS),
]
REBUILT = [
    _one("weight-norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), _TOKENS),
    _one("weight-norm-conv", lambda: parametrizations.weight_norm(nn.Conv1d(4, 2, 2)), _LINE),
    _one("weight-norm-hook", lambda: weight_norm(nn.Linear(4, 3)), _TOKENS),
    _one("spectral-norm", lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), _TOKENS),
    _one("spectral-norm-hook", lambda: spectral_norm(nn.Conv1d(4, 2, 2)), _LINE),
    _one("symmetric", symmetric, _TOKENS),
]
LAYERS = {
    case.name: case for family in (CONVOLUTIONS, TRANSPOSED, NORMS, EMBEDDINGS, ATTENTION, RECURRENT, OTHERS, REBUILT) for case in family
}
