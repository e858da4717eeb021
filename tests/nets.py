"""Small deterministic float64 networks with their data: the cases that the tests walk.

What this file claims, and the tests rely on:

* `Case.make()` builds the same float64 network each time, and leaves the global random state as it was;
* a criterion is a plain `torch.nn` one, an input has the examples on its leading dimension, and nothing is random in a forward pass;
* the cases hold the traps of real networks: in-place activations, groups, stride, padding and dilation, missing biases, BatchNorm with
  running and with batch statistics, tied weights, a module called twice, packed attention and LSTM weights, fused attention kernels (which
  have no second derivative), class dimension in the middle, several terms an example, ignored targets.

`conv` holds its BatchNorm in eval mode and `bn_train` in training mode: do not call `.train()` or `.eval()` on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A network, a criterion, and one batch. `make()` gives a fresh, seeded, double network."""

    name: str
    make: Callable[[], nn.Module]
    criterion: nn.Module
    inputs: Tensor
    targets: Tensor


class Transformer(nn.Module):
    """One pre-norm block with causal attention (one head) and the embedding tied to the head.

    Tokens (N, T) to logits (N, V, T), the layout of `nn.CrossEntropyLoss`, or (N T, V) when `flat`.
    """

    def __init__(self, vocabulary: int = 7, dim: int = 4, *, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        self.embedding = nn.Embedding(vocabulary, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm3 = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.norm1(x)
        q, k, v = (layer(y).unsqueeze(1) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        x = x + self.mlp(self.norm2(x))
        logits = self.head(self.norm3(x))
        return logits.flatten(0, 1) if self.flat else logits.transpose(1, 2)


class Attention(nn.Module):
    """`nn.MultiheadAttention` with two heads, the mean over positions, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """`nn.LSTM`, and a Linear on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Reused(nn.Module):
    """One Linear called twice, so that its gradient is the sum of two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


def _tanh(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def _conv() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, padding=1, dilation=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    model[5].eval()
    return model


def _bn_train() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a network in double from a seed; norms get weights, biases and running statistics away from 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                    module.weight.uniform_(0.5, 1.5)
                    if module.bias is not None:
                        module.bias.normal_(0.0, 0.3)
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                    module.running_mean.normal_(0.0, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
                if isinstance(module, nn.MultiheadAttention):
                    module.in_proj_bias.normal_(0.0, 0.3)
                    module.out_proj.bias.normal_(0.0, 0.3)
    return model


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal float64 data from a seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(high: int, *shape: int, seed: int = 2) -> Tensor:
    """Integer labels in [0, high) from a seed."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _case(name: str, build: Callable[[], nn.Module], criterion: nn.Module, inputs: Tensor, targets: Tensor) -> Case:
    return Case(name, lambda: seeded(build), criterion, inputs, targets)


def _ignoring(targets: Tensor) -> Tensor:
    """Ignore three targets of the first example, one of the second, none of the third."""
    targets = targets.clone()
    targets[0, 1:4] = -100
    targets[1, 4] = -100
    return targets


_TOKENS, _NEXT = labels(7, 3, 5, seed=3), labels(7, 3, 5, seed=4)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _case("mlp", _mlp, nn.CrossEntropyLoss(), normal(6, 4), labels(3, 6)),
        _case("conv", _conv, nn.CrossEntropyLoss(), normal(4, 2, 6, 6), labels(3, 4)),
        _case("transformer", Transformer, nn.CrossEntropyLoss(), _TOKENS, _NEXT),
        _case("transformer_flat", lambda: Transformer(flat=True), nn.CrossEntropyLoss(), _TOKENS, _NEXT.flatten()),
        _case("transformer_ignore", Transformer, nn.CrossEntropyLoss(ignore_index=-100), _TOKENS, _ignoring(_NEXT)),
        _case("mse", lambda: _tanh(2), nn.MSELoss(), normal(6, 4), normal(6, 2, seed=5)),
        _case("mse_sum", lambda: _tanh(2), nn.MSELoss(reduction="sum"), normal(6, 4), normal(6, 2, seed=5)),
        _case("bce", lambda: _tanh(3), nn.BCEWithLogitsLoss(), normal(6, 4), labels(2, 6, 3).double()),
        _case("mha", Attention, nn.CrossEntropyLoss(), normal(4, 3, 4), labels(3, 4)),
        _case("lstm", Recurrent, nn.CrossEntropyLoss(), normal(4, 3, 3), labels(3, 4)),
        _case("reused", Reused, nn.CrossEntropyLoss(), normal(6, 4), labels(3, 6)),
        _case("bn_train", _bn_train, nn.CrossEntropyLoss(), normal(6, 4), labels(3, 6)),
    )
}
