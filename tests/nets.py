"""Small deterministic float64 networks with their data: the cases that the tests walk.

What this file claims, and the tests rely on:

* `Case.make()` builds the same float64 network each time, and leaves the global random state as it was;
* a criterion is a plain `torch.nn` one, an input has the examples on its leading dimension, and nothing is random in a forward pass;
* the cases hold the traps of real networks: in-place activations, groups, stride, padding and dilation, missing biases, BatchNorm with
  running and with batch statistics, tied weights, a module called twice, packed attention and LSTM weights, fused attention kernels (which
  have no second derivative), class dimension in the middle, several terms an example, ignored targets, layers that see (B T, C);
* `SHRUNK` holds `transformers`' own GPT-2 and ViT with small configs; the package is imported when one is made.

`conv` holds its BatchNorm in eval mode and `bn_train` in training mode: do not call `.train()` or `.eval()` on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
    rows: Mapping[str, str] = field(default_factory=dict)  # of layers whose leading dimension is not the batch


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


class FlatTokens(nn.Module):
    """Layers that see (B T, C): an embedding, and two Linear with a running mean over positions between them. Logits (B T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.lower = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.upper = nn.Linear(4, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.lower(self.embedding(tokens).flatten(0, 1))).unflatten(0, tokens.shape)
        return self.upper(self.norm((x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1).unsqueeze(1)).flatten(0, 1)))


FLAT = {"lower": "flattened", "norm": "flattened", "upper": "flattened"}


class GPT2(nn.Module):
    """`GPT2LMHeadModel` with tied embeddings: tokens (N, T) to logits (N, V, T). Positions are given, one row an example."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.model(input_ids=tokens, position_ids=positions).logits.transpose(1, 2)


class ViT(nn.Module):
    """`ViTForImageClassification`: images (N, 1, 4, 4) to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def gpt2(vocabulary: int = 5) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 4, "n_inner": 4, "vocab_size": vocabulary, "n_positions": 5}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, initializer_range=0.5, bos_token_id=None, eos_token_id=None))


def vit(classes: int = 3) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    images = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": classes}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**sizes, **images, **no_dropout, initializer_range=0.5))


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
                if isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None:
                    module.in_proj_bias.normal_(0.0, 0.3)
                    module.out_proj.bias.normal_(0.0, 0.3)
    return model


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal float64 data from a seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(high: int, *shape: int, seed: int = 2) -> Tensor:
    """Integer labels in [0, high) from a seed."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _case(
    name: str, build: Callable[[], nn.Module], criterion: nn.Module, inputs: Tensor, targets: Tensor, rows: Mapping[str, str] | None = None
) -> Case:
    return Case(name, lambda: seeded(build), criterion, inputs, targets, rows or {})


def _ignoring(targets: Tensor) -> Tensor:
    """Ignore three targets of the first example, one of the second, none of the third."""
    targets = targets.clone()
    targets[0, 1:4] = -100
    targets[1, -1] = -100
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
        _case(
            "flat_tokens", FlatTokens, nn.CrossEntropyLoss(), labels(5, 3, 3, seed=6), _ignoring(labels(5, 3, 3, seed=7)).flatten(), FLAT
        ),
    )
}

SHRUNK: dict[str, Case] = {
    case.name: case
    for case in (
        _case("gpt2", GPT2, nn.CrossEntropyLoss(), labels(5, 2, 3, seed=8), labels(5, 2, 3, seed=9)),
        _case("vit", ViT, nn.CrossEntropyLoss(), normal(3, 1, 4, 4), labels(3, 3)),
    )
}
