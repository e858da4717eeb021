"""Claims about SENG's economies in `layer_gram`. Exact to 1e-10 against loops over examples.

- positions: C is that of examples whose output gradients are cut to so many singular values; exact from min(R, out) on, and off by less
  than the next singular value times |a|_2 elsewhere.
- sketch: the mean over all pairs of index sets is the Gram matrix, and one set alone is not; products and `to_dense` are exact. Without a
  sketch smaller than a layer the direction is (C + l I)^-1 g, and l -> inf gives g / l.
- Draws are new at each refresh, keyed, and come again after a resume; what is not finite counts for nothing.
"""

from __future__ import annotations

import copy
import io
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from nets import labels, normal, seeded
from precond.history import Window
from precond.operators import Gram
from precond.representations import LayerGram
from precond.representations.gram_sketch import few_positions, on_few_coordinates
from training import LR, batches, differ, fit, make, net, plain, same, sgd, theta

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE = nn.CrossEntropyLoss()


def sequence() -> nn.Module:
    """A linear layer at six positions, so large that its rows are kept as factors, with a mean over them before the loss."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(30, 28, bias=False), nn.Linear(28, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.inner(x))).mean(1)

    return seeded(Pooled)


X, Y = normal(5, 6, 30, seed=3), labels(3, 5)


def by_loops(positions: int | None) -> Tensor:
    """The empirical Fisher of the inner layer, (840, 840)."""
    model, total = sequence(), torch.zeros(840, 840, dtype=torch.float64)
    for x, y in zip(X, Y, strict=True):
        hidden = model.inner(x)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model.outer(torch.tanh(hidden)).mean(0), y), hidden)
        P, S, Q = torch.linalg.svd(g, full_matrices=False)
        kept = len(S) if positions is None else positions
        u = ((P[:, :kept] * S[:kept]) @ Q[:kept]).T @ x
        total += torch.outer(u.flatten(), u.flatten()) / len(X)
    return total


def curve(repr: Any) -> Any:
    return precond.curvature(sequence(), CE, X, Y, matrix="empirical_fisher", repr=repr).blocks["inner"]


@pytest.mark.parametrize("positions", [1, 2, 6, 9])
def test_positions_are_those_of_the_largest_singular_values(positions: int) -> None:
    C = curve(LayerGram(positions=positions))
    assert isinstance(C, Gram)
    a, g = (C.fields()["pieces"]["0"][name] for name in ("a", "g"))
    assert a.shape[-2] == g.shape[-2] == min(positions, 6), "negative control: it is held as factors, of so many positions"
    want = by_loops(positions)
    close(C.to_dense(), want)
    close(C.gram.trace(), want.trace())
    if positions < 6:
        differ(want, by_loops(None), 1e-6)
    else:
        close(want, by_loops(None))


def test_what_positions_lose_is_below_the_next_singular_value() -> None:
    a, g = normal(4, 1, 5, 7, seed=1), normal(4, 2, 5, 6, seed=2)
    whole = torch.einsum("nkro,nkri->nkoi", g, a.expand(-1, 2, -1, -1))
    for kept in (1, 3, 5):
        b, h = few_positions((a, g), kept)
        assert b.shape == (4, 2, kept, 7) and h.shape == (4, 2, kept, 6)
        left = torch.linalg.matrix_norm(whole - torch.einsum("nkro,nkri->nkoi", h, b))
        values = torch.cat([torch.linalg.svdvals(g), torch.zeros(4, 2, 1, dtype=torch.float64)], -1)
        bound = values[..., kept:].square().sum(-1).sqrt() * torch.linalg.matrix_norm(a, 2)
        assert bool((left <= bound + 1e-10).all())
        assert kept == 5 or bool((left > 1e-3).all())


def test_the_mean_of_a_sketch_over_all_index_sets_is_the_gram_matrix() -> None:
    a, g = normal(3, 1, 2, 4, seed=1), normal(3, 2, 2, 3, seed=2)
    exact = Gram([(a.squeeze(1), g.movedim(1, 0).flatten(0, 1))]).gram
    found = []
    for inside, outside in itertools.product(itertools.combinations(range(4), 2), itertools.combinations(range(3), 2)):
        b, h = on_few_coordinates((a, g), torch.tensor(inside), torch.tensor(outside))
        found.append(Gram([(b.squeeze(1), h.movedim(1, 0).flatten(0, 1))]).gram)
        differ(found[-1], exact, 1e-3)
    close(torch.stack(found).mean(0), exact)
    close(on_few_coordinates((a, g), None, None)[1], g)


def test_only_the_gram_matrix_is_an_estimate() -> None:
    model = sequence()
    data: dict[str, Any] = {"matrix": "empirical_fisher", "repr": LayerGram(sketch=10)}
    C, exact = precond.curvature(model, CE, X, Y, **data).blocks["inner"], curve("layer_gram")
    v = normal(840)
    close(C @ v, exact @ v)
    close(C.to_dense(), exact.to_dense())
    differ(C.gram, exact.gram, 1e-3)
    close(C.gram, C.gram.T)


def sketched(q: int | None, damping: float = 0.1, **options: Any) -> precond.Preconditioner:
    seed = options.pop("seed_of_draws", 0)
    return make("empirical_fisher", LayerGram(sketch=q, seed=seed), "smw", damping, **options)


def test_it_trains_exactly_where_nothing_is_left_out_and_draws_are_keyed() -> None:
    """Layers of 4 inputs and 5 outputs, 5 and 3, biases of 5 and 3."""
    exact = fit(make("empirical_fisher", "layer", "cholesky"))
    same(fit(sketched(5)), exact)
    same(fit(sketched(None)), exact)
    differ(fit(sketched(2)), exact)
    same(fit(sketched(2)), fit(sketched(2)))
    differ(fit(sketched(2)), fit(sketched(2, seed_of_draws=1)))
    model = net()
    preconditioner = sketched(2).attach(model, CE, optimizer := sgd(model, lr=0.0))
    drawn = []
    for _ in range(3):
        plain(model, CE, optimizer, *batches(1)[0])
        drawn.append(preconditioner.operators["0"].gram)  # type: ignore[attr-defined]
    differ(drawn[1], drawn[0])
    differ(drawn[2], drawn[1])


def test_a_large_damping_leaves_the_gradient() -> None:
    model, (x, y) = net(), batches(1)[0]
    g = torch.cat([t.flatten() for t in torch.autograd.grad(CE(model(x), y), list(model.parameters()))])
    moved = theta(net()) - theta(fit(sketched(2, damping=1e9), data=[(x, y)]))
    torch.testing.assert_close(moved * 1e9 / LR, g, rtol=1e-6, atol=1e-6)  # theta - theta' loses nine digits


@pytest.mark.parametrize("history", ["local", Window(2)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(history: Any) -> None:
    data = batches(6)
    run = partial(sketched, 2, solver_interval=2, history=history)
    whole = fit(run(), data=data)
    model = fit(first := run(), data=data[:3])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = copy.deepcopy(net())
    again.load_state_dict(model.state_dict())
    second = run().attach(again, CE, optimizer := sgd(again))
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for x, y in data[3:]:
        plain(again, CE, optimizer, x, y)
    torch.testing.assert_close(theta(again), theta(whole), rtol=0, atol=0)


def test_an_observation_that_is_not_finite_moves_nothing() -> None:
    model = sequence()
    preconditioner = make("empirical_fisher", LayerGram(positions=2, sketch=9), "smw").attach(model, CE, optimizer := sgd(model))
    plain(model, CE, optimizer, X, Y)
    kept, gram = theta(model), preconditioner.operators["inner"].to_dense()
    plain(model, CE, optimizer, X * torch.nan, Y)
    assert torch.equal(theta(model), kept)
    close(preconditioner.operators["inner"].to_dense(), gram)


def test_a_gradient_a_step_is_sketched_as_explicit_layers_are() -> None:
    made = LayerGram(sketch=3, seed=4).over("gradient")
    assert (made.sketch, made.seed) == (9, 4)  # type: ignore[attr-defined]
    for options in ({"sketch": 0}, {"positions": 0}):
        with pytest.raises(ValueError, match="keep at least one"):
            LayerGram(**options)
    model = sequence()
    notes = make("empirical_fisher", LayerGram(sketch=3, positions=2), "smw").attach(model, CE, sgd(model)).describe().rows
    assert notes[0].note == "at most 2 positions of an example, Gram matrix estimated from at most 3 inputs and outputs"
