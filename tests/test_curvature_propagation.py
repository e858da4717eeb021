"""Claims about `GGN(estimator="curvature_propagation")` (float64, no Monte-Carlo tolerance).

- The mean over all signs, one for each example, position and class, IS the GGN: by columns, blocks, Kronecker factors and products, for
  one and two samples; with one sign for all positions it is not, where a network mixes them.
- One draw is of rank one an example and is not the GGN; it is keyed by the seed, and products and blocks use the same signs.
- Samples are averaged; options without a meaning are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from nets import CASES, labels, normal, seeded
from precond.matrices import GGN
from precond.matrices import ggn as module

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
Enumerate = Callable[[Callable[[], Tensor], int], Tensor]


def apart(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * b.norm())


def of(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, repr: str = "full", samples: int = 1, seed: int = 0) -> Tensor:
    matrix = GGN(estimator="curvature_propagation", samples=samples)
    return precond.curvature(model, criterion, x, y, matrix=matrix, repr=repr, seed=seed).to_dense()


@pytest.fixture
def mean_over_signs(monkeypatch: pytest.MonkeyPatch) -> Enumerate:
    def enumerated(made: Callable[[], Tensor], count: int) -> Tensor:
        """The mean of `made()` over all signs that it draws, `count` of them."""
        queue: Iterator[float] = iter(())

        def given(shape: Sequence[int], generator: torch.Generator) -> Tensor:
            return torch.tensor([next(queue) for _ in range(torch.Size(shape).numel())], dtype=torch.float64).reshape(tuple(shape))

        monkeypatch.setattr(module, "_signs", given)
        total: Any = 0.0
        for signs in itertools.product((-1.0, 1.0), repeat=count):
            queue = iter(signs)
            total = total + made()
            assert next(queue, None) is None, "every sign is drawn once"
        return total / 2**count

    return enumerated


def build(outputs: int = 2) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs)))


@pytest.mark.parametrize("repr", ["full", "layer", "kron_io", "matrix_free"])
@pytest.mark.parametrize(
    ("criterion", "samples"),
    [(nn.CrossEntropyLoss(), 1), (nn.BCEWithLogitsLoss(), 1), (nn.MSELoss(reduction="sum"), 1), (nn.CrossEntropyLoss(), 2)],
    ids=str,
)
def test_the_mean_over_all_signs_is_the_ggn(criterion: nn.Module, samples: int, repr: str, mean_over_signs: Enumerate) -> None:
    model, x = build(), normal(2, 2)
    y = labels(2, 2) if isinstance(criterion, nn.CrossEntropyLoss) else labels(2, 2, 2).double()
    want = precond.curvature(model, criterion, x, y, matrix="ggn", repr=repr).to_dense()
    if repr == "full":
        close(want, dense.ggn(model, criterion, x, y))
    close(mean_over_signs(lambda: of(model, criterion, x, y, repr, samples), 4 * samples), want)


class Mixing(nn.Module):
    """Two positions that see each other; classes where nn.CrossEntropyLoss has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + h.sum(1, keepdim=True)).transpose(1, 2)


@pytest.mark.parametrize("repr", ["full", "matrix_free"])
def test_every_position_has_a_sign_of_its_own(repr: str, mean_over_signs: Enumerate, monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion, x, y = seeded(Mixing), nn.CrossEntropyLoss(), normal(2, 2, 2), labels(2, 2, 2)
    want = dense.ggn(model, criterion, x, y)
    close(mean_over_signs(lambda: of(model, criterion, x, y, repr), 8), want)
    total: Any = 0.0
    for first, second in itertools.product((-1.0, 1.0), repeat=2):  # the control: one sign a class, whatever the position
        queue = iter((first, second))
        monkeypatch.setattr(module, "_signs", lambda shape, generator, queue=queue: torch.full(tuple(shape), next(queue)))
        total = total + of(model, criterion, x, y, repr) / 4
    assert apart(total, want)


def test_one_draw_has_one_column_an_example_and_is_not_the_ggn() -> None:
    case = CASES["mlp"]
    M = of(case.make(), case.criterion, case.inputs, case.targets)
    assert torch.linalg.matrix_rank(M, rtol=1e-10, hermitian=True) <= len(case.inputs)
    assert apart(M, dense.ggn(case.make(), case.criterion, case.inputs, case.targets))


@pytest.mark.parametrize("name", ["mlp", "transformer", "transformer_flat", "bce"])
def test_the_seed_keys_the_signs(name: str) -> None:
    case = CASES[name]
    first, again, other = (of(case.make(), case.criterion, case.inputs, case.targets, samples=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and apart(first, other)
    close(of(case.make(), case.criterion, case.inputs, case.targets, "matrix_free", 2, seed=1), first)


def test_signs_are_fair_and_independent_of_each_other() -> None:
    signs = module._signs((2, 5000, 1), torch.Generator().manual_seed(0)).double()
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.05 and (signs[0] * signs[1]).mean().abs() < 0.05, "five standard errors: 1 / sqrt(5000) is 0.014"


def test_samples_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp"]
    monkeypatch.setattr(module, "_signs", lambda shape, generator: torch.ones(tuple(shape)))
    data = (case.make(), case.criterion, case.inputs, case.targets)
    close(of(*data, samples=3), of(*data, samples=1))


def test_options_without_a_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="choose 'exact' or 'curvature_propagation'"):
        GGN(estimator="hutchinson")
    for options in ({"samples": 2}, {"estimator": "curvature_propagation", "samples": 0}):
        with pytest.raises(ValueError, match="at least one column of signs"):
            GGN(**options)
