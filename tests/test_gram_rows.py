"""Claims about `full_gram`, `layer_gram`, `unit_gram`, beside the grid of `test_curvature.py`. Exact to 1e-10.

- Identity 19: the Gram matrix of a Linear layer is (A A^T) o (G G^T), those of the layers add, and its spectrum is that of the matrix.
- Batches in parts, of unequal sizes and lengths, layers that are called in some of them, tied and repeated calls: the dense matrix.
- Rows are kept where they are fewer numbers than their factors, and only there; both forms have one matrix.
- A window of steps is the mean of their matrices; batches of another length are refused there.
- Cost: beside what the step holds the largest tensors of a step are the Gram matrix and one vector, where rows would be n of them; what
  lives on is n^2 and the factors.
- One observation that is not finite counts for nothing.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dense
import dense_cells
import precond
from nets import CASES, labels, normal, seeded
from precond.history import Window
from precond.operators import Gram
from precond.representations.factored_rows import Slot
from precond.solvers import SMW
from training import LR, batches, differ, fit, make, move, net, same, solve

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE = nn.CrossEntropyLoss()
FORMS = ("full", "layer", "unit")


def curve(model: nn.Module, repr: Any, matrix: str = "ggn", criterion: nn.Module = CE, **data: Any) -> Any:
    return precond.curvature(model, criterion, matrix=matrix, repr=repr, seed=0, **data)


# -- 19 ------------------------------------------------------------------------------------------------------------------


def test_19_the_gram_matrix_is_a_product_of_two_by_layer_and_a_sum_over_layers() -> None:
    case, seen = CASES["mlp"], []
    model = case.make()
    linear = [m for m in model if isinstance(m, nn.Linear)]

    def keep(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        seen.append((args[0].detach().clone(), out))
        return out.clone()  # an in-place activation must not take the output's place

    for module in linear:
        module.register_forward_hook(keep)
    losses = nn.functional.cross_entropy(model(case.inputs), case.targets, reduction="sum")
    grads, n = torch.autograd.grad(losses, [out for _, out in seen]), len(case.inputs)
    want = [((a @ a.T + 1) * (g @ g.T)) / n for (a, _), g in zip(seen, grads, strict=True)]
    data = {"inputs": case.inputs, "targets": case.targets}
    layers = curve(case.make(), "layer_gram", "empirical_fisher", **data)
    for K, block in zip(want, layers.blocks.values(), strict=True):
        assert isinstance(block, Gram)
        close(block.gram, K)
    full = curve(case.make(), "full_gram", "empirical_fisher", **data).blocks["model"]
    close(full.gram, sum(want[1:], want[0]))
    M = dense_cells.whole(case, "empirical_fisher")
    close(torch.linalg.eigvalsh(full.gram), torch.linalg.eigvalsh(M)[-n:])
    differ(layers.blocks["0"].gram, (seen[0][0] @ seen[0][0].T) * (grads[0] @ grads[0].T) / n)  # without the homogeneous coordinate


# -- parts, positions, calls -----------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Embedding, a layer that is called twice, and a branch that long batches alone take."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.twice, self.long = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(self.embedding(x))))
        if x.shape[1] > 2:
            h = h + self.long(h)
        return self.head(self.norm(h).mean(1))


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "gradient_covariance"])
@pytest.mark.parametrize("scope", FORMS)
def test_parts_of_unequal_sizes_and_lengths_are_one_matrix(scope: str, matrix: str) -> None:
    data = [(labels(5, n, length, seed=n), labels(3, n, seed=7 + n)) for n, length in ((2, 2), (3, 4), (1, 3))]
    got = curve(seeded(Tokens), f"{scope}_gram", matrix, batches=data).to_dense()
    want = curve(seeded(Tokens), scope, matrix, batches=data).to_dense()
    close(got, want)
    differ(got, curve(seeded(Tokens), f"{scope}_gram", matrix, batches=data[1:]).to_dense())
    if (scope, matrix) == ("full", "ggn"):
        model, sizes = seeded(Tokens), (2, 3, 1)
        close(want, sum(n / 6 * dense.ggn(model, CE, x, y) for n, (x, y) in zip(sizes, data, strict=True)))


@pytest.mark.parametrize("scope", ["full", "layer"])
def test_rows_are_kept_where_they_are_fewer_numbers(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 9, 5), nn.Flatten(), nn.Linear(36, 3)))

    data = {"inputs": normal(3, 2, 6, 6), "targets": labels(3, 3)}
    found = curve(model(), f"{scope}_gram", "empirical_fisher", **data)
    pieces = [type(piece).__name__ for block in found.blocks.values() for piece in block.pieces]
    assert pieces == ["PlainRows", "PlainRows", "OuterRows", "PlainRows", "OuterRows", "PlainRows"]  # 36 positions are many, 4 are few
    monkeypatch.setattr(Slot, "settle", lambda self, pairs: pairs)
    other = curve(model(), f"{scope}_gram", "empirical_fisher", **data)
    assert next(type(piece).__name__ for block in other.blocks.values() for piece in block.pieces) == "OuterRows"
    close(other.to_dense(), found.to_dense())
    close(found.to_dense(), curve(model(), scope, "empirical_fisher", **data).to_dense())


def test_units_that_are_small_or_many_fall_back_to_dense_blocks_and_say_why() -> None:
    for form in ("unit_gram", "unit_low_rank"):
        with make("ggn", form, "smw").attach(seeded(Tokens), CE) as preconditioner:
            shown = str(preconditioner.describe())
        assert "its units have 2 parameters" in shown and "a unit for each entry of a vocabulary" in shown


# -- histories -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_window_of_steps_is_the_mean_of_their_matrices(scope: str, reduction: Any) -> None:
    ours = fit(make("ggn", f"{scope}_gram", "smw", history=Window(2, reduction=reduction)), steps=4)
    model, seen = net(), []
    for x, y in batches(4):
        M = dense.ggn(model, CE, x, y)
        seen = [*seen, {"full": M, "layer": dense.project_layer(M, model), "unit": dense.project_unit(M, model)}[scope]][-2:]
        move(model, -LR * solve(sum(seen[1:], seen[0]) / (len(seen) if reduction == "mean" else 1), 0.1, dense.gradient(model, CE, x, y)))
    same(ours, model)
    differ(ours, fit(make("ggn", f"{scope}_gram", "smw"), steps=4))


def test_a_window_cannot_hold_batches_of_two_lengths() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.Linear(8, 8), nn.Flatten(1, 1), nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        make("ggn", "layer_gram", "smw", history=Window(2)).attach(model, CE, optimizer),
        pytest.raises(ValueError, match="the same length"),
    ):
        for length in (2, 3):
            CE(model(labels(5, 4, length)), labels(3, 4)).backward()
            optimizer.step()


def test_an_observation_that_is_not_finite_counts_for_nothing() -> None:
    data = batches(3)
    bad = [data[0], (data[1][0] * torch.nan, data[1][1]), data[2]]
    for repr in ("layer_gram", "layer_low_rank"):
        ours = fit(make("ggn", repr, "smw", history=Window(3)), data=bad)
        same(ours, fit(make("ggn", "layer", "cholesky", history=Window(3)), data=bad))


# -- cost ------------------------------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """The sizes of the tensors that are made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.sizes += [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]
        return out


WIDTHS, N = (40, 60, 60, 10), 16


def wide() -> nn.Module:
    return nn.Sequential(*(m for i, o in itertools.pairwise(WIDTHS) for m in (nn.Linear(i, o), nn.Tanh())))


def step(repr: str) -> tuple[list[int], precond.Preconditioner, nn.Module]:
    """The sizes of all tensors that the second step makes in the optimizer's hook, the update included."""
    model = wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = make("empirical_fisher", repr, SMW(promote=0.0), 0.1, self_check=False).attach(model, CE, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        CE(model(torch.randn(N, WIDTHS[0])), torch.randint(10, (N,))).backward()
        with Made() as made:
            optimizer.step()
    return made.sizes, preconditioner, model


@pytest.mark.parametrize(("form", "of_one"), [("full", sum), ("layer", max)])
def test_a_step_makes_the_gram_matrix_and_vectors_and_no_rows(form: str, of_one: Any) -> None:
    sizes, preconditioner, model = step(f"{form}_gram")
    vector = of_one(i * o + o for i, o in itertools.pairwise(WIDTHS))
    assert max(sizes) == vector > N**2, "a direction of one block"
    assert N**2 in sizes
    numbers = sum(i + o for i, o in itertools.pairwise(WIDTHS))
    kept = sum(b.bytes_held() for b in preconditioner._session.blocks) / 4  # type: ignore[union-attr]
    blocks = len(preconditioner.operators)
    assert kept < 2 * N * (numbers + 2 * sum(WIDTHS[1:])) + 2 * blocks * N**2 + 100 < N * sum(p.numel() for p in model.parameters()) / 2
    preconditioner.remove()


def test_rows_are_n_times_as_many_numbers() -> None:
    """Negative control: the counter counts."""
    sizes, preconditioner, model = step("full_low_rank")
    assert max(sizes) == N * sum(p.numel() for p in model.parameters())
    preconditioner.remove()


@pytest.mark.parametrize("repr", [f"{scope}_{form}" for scope in FORMS for form in ("gram", "low_rank")])
def test_smw_inverts_groups_and_transposed_layers(repr: str) -> None:
    layers = nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(36, 3)
    model = nn.Sequential(*layers).double()
    C = curve(model, repr, inputs=normal(3, 4, 3, 3), targets=labels(3, 3))
    M = dense.ggn(model, CE, normal(3, 4, 3, 3), labels(3, 3))
    M = {"full": M, "layer": dense.project_layer(M, model), "unit": dense.project_unit(M, model)}[repr.split("_")[0]]
    close(C.to_dense(), M)
    v = normal(len(M))
    close(precond.inverse(C, solver="smw", damping=0.1) @ v, solve(M, 0.1, v))
