"""Claims about pairs (v, C v) and (v, g), from the observation to the representation.

- The operator `Pairs` is a constraint: it has no product, dense form, spectrum or sample, and says so; it is packed and cast like any other.
- Of every matrix with products or a gradient, `psgd` is given h = C v, or the gradient, of the dense oracle, with one v over all parameters;
  micro-batches, other blocks and a resumed run draw the same v, another step and another seed do not.
- Each representation gives the structure to fit; a fallback keeps the solver. Training goes on bit by bit after a resume.
- Hutchinson: unbiased over all sign vectors, exact for a diagonal C, not for another; `row_norms` is the root of diag(C^2); spatial
  averages by loops. `precond.curvature` and a `Preconditioner` average the same estimates.
- `bfgs` follows pairs of any matrix: a quadratic's inverse along n directions. Solvers that follow nothing are given what they were.
- What cannot be is refused at construction: a history over pairs, a structure that a solver does not fit, a matrix that has no pairs.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dense
import dense_cells
import precond
from precond import cells, matrices, representations, solvers
from precond.damping import Relative, Tikhonov
from precond.errors import InvalidCombination
from precond.history import Ema
from precond.observe import Probes
from precond.operators import BlockDiagonal, Fit, Operator, Pairs, pack, unpack
from precond.representations import Diagonal, KronDim
from precond.solvers import BFGS, CG, PSGD, Cholesky
from training import accumulate, batches, make, net, plain, sgd, theta

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
CRITERION = nn.CrossEntropyLoss()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(n: int, seed: int = 0) -> Tensor:
    A = draw(n, n, seed=seed)
    return (A + A.T) / 2


# --- the operator


def test_pairs_are_no_matrix_and_say_so() -> None:
    pairs = Pairs(draw(4), draw(4, seed=1), "dense")
    asks: list[Any] = [
        lambda: pairs @ draw(4), pairs.to_dense, pairs.diagonal, pairs.trace, lambda: pairs.quadratic_form(draw(4)), pairs.logdet, pairs.spectral,
        pairs.sample, lambda: pairs.inverse_root(1.0),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(InvalidCombination, match="a constraint, not a matrix"):
            ask()
    assert pairs.shape == (4, 4) and pairs.dtype == torch.float64 and not pairs.live


def test_pairs_are_packed_and_cast() -> None:
    fit = Fit((2, 3), ("dense", "diagonal"), batch=2)
    pairs = Pairs(draw(3, 12), draw(3, 12, seed=1), fit, whitening=True)
    for back in (unpack(pack(pairs)), pairs.to(dtype=torch.float32).to(dtype=torch.float64), unpack(pack(BlockDiagonal({"0": pairs}))).blocks["0"]):
        assert isinstance(back, Pairs) and back.structure == fit and back.whitening
        assert_close(back.v, pairs.v, rtol=1e-6, atol=1e-6)  # float32 in between
        assert_close(back.h, pairs.h, rtol=1e-6, atol=1e-6)
    assert len(list(pairs.tensors())) == 2


def test_fits_are_checked_and_named() -> None:
    names = {
        "dense": Fit((4,), ("dense",)), "diagonal": Fit((4,), ("diagonal",)), "kronecker": Fit((2, 2), ("diagonal", "diagonal")),
        "low_rank": Fit((4,), ("diagonal",), rank=2),
    }  # fmt: skip
    for name, fit in names.items():
        assert (fit.name, fit.n) == (name, 4)
    assert [fit.numbers for fit in names.values()] == [16, 4, 4, 20]
    for bad in (
        lambda: Fit((2,), ("dense", "dense")), lambda: Fit((), ()), lambda: Fit((2,), ("square",)), lambda: Fit((2,), ("dense",), rank=1),  # type: ignore[arg-type]
        lambda: Pairs(draw(3), draw(4), "dense"), lambda: Pairs(draw(3), draw(3), "kron"), lambda: Pairs(draw(3), draw(3), Fit((4,), ("dense",))),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(ValueError):
            bad()


# --- the observation


def observed(matrix: Any, repr: Any = "full", loop: Any = plain, step: int = 0, solver: Any = "psgd", **options: Any) -> dict[str, Pairs]:
    """The pairs of a step at the first parameters, by block."""
    model = net()
    preconditioner = make(matrix, repr, solver, 1e-3, **options).attach(model, CRITERION, optimizer := sgd(model, lr=0.0))
    for batch in batches(step + 1):
        loop(model, CRITERION, optimizer, *batch)
    return preconditioner.operators  # type: ignore[return-value]


WITH_PRODUCTS = [m for m in matrices.names() if "product" in matrices.get(m)().supplies]
WITH_GRADIENTS = [m for m in matrices.names() if "gradient" in matrices.get(m)().supplies]


@pytest.mark.parametrize("matrix", WITH_PRODUCTS)
def test_newton_pairs_are_those_of_the_dense_matrix(matrix: str) -> None:
    if matrix == "fisher_mc":
        first, second = (observed(matrix)["model"] for _ in range(2))
        assert torch.equal(first.h, second.h)  # its drawn labels are an oracle of their own: see test_curvature_sampled
        return
    pairs = observed(matrix)["model"]
    x, y = batches(1)[0]
    C = dense_cells.MATRICES["hessian" if matrix == "abs_hessian" else matrix](net(), CRITERION, x, y)  # the fit makes the absolute value
    assert not pairs.whitening and pairs.v.shape == (1, 43)
    assert_close(pairs.h[0], C @ pairs.v[0], **EXACT)
    assert abs(float(pairs.v.square().mean()) - 1) < 0.5 and len(pairs.v.unique()) == 43  # normal, not signs


@pytest.mark.parametrize("matrix", WITH_GRADIENTS)
def test_whitening_pairs_hold_the_gradient_and_noise(matrix: str) -> None:
    pairs = observed(matrix)["model"]
    assert pairs.whitening
    if matrix == "batched_empirical_fisher":
        assert_close(pairs.h[0], dense.gradient(net(), CRITERION, *batches(1)[0]), **EXACT)
    other = observed(matrix, seed=1)["model"]
    assert not torch.equal(pairs.v, other.v)


def test_draws_depend_on_seed_step_and_parameter_alone() -> None:
    v = observed("ggn")["model"].v
    assert torch.equal(observed("ggn")["model"].v, v)
    split = observed("ggn", loop=accumulate(1, 2, 3))["model"]
    assert torch.equal(split.v, v)
    assert_close(split.h, observed("ggn")["model"].h, **EXACT)
    layers = observed("ggn", "layer")
    assert torch.equal(torch.cat([p.v for p in layers.values()], 1), v)  # one v over all blocks
    alone = observed("ggn", "layer", overrides={"0": None})
    assert torch.equal(alone["2"].v, layers["2"].v)
    for other in (observed("ggn", step=1)["model"], observed("ggn", seed=1)["model"]):
        assert not torch.equal(other.v, v)


def test_a_blocks_pair_holds_the_rows_outside_it() -> None:
    """As published: h = (C v) of the block with v everywhere; a block alone has its own product."""
    x, y = batches(1)[0]
    C = dense.ggn(net(), CRITERION, x, y)
    layers = observed("ggn", "layer")
    v, h = (torch.cat([getattr(p, name)[0] for p in layers.values()]) for name in "vh")
    assert_close(h, C @ v, **EXACT)
    assert_close(observed("ggn", "layer", overrides={"0": None})["2"].h[0], C[25:, 25:] @ v[25:], **EXACT)


STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("model", {"sizes": (43,), "forms": ("dense",)}),
    "layer": ("0", {"sizes": (25,), "forms": ("dense",)}),
    "unit": ("0", {"sizes": (5,), "forms": ("dense",), "batch": 5}),
    "diagonal": ("0.weight", {"sizes": (20,), "forms": ("diagonal",)}),
    "kron_io": ("0", {"sizes": (5, 5), "forms": ("dense", "dense")}),
    "kron_dim": ("0.weight", {"sizes": (5, 4), "forms": ("dense", "dense")}),
    "full_low_rank": ("model", {"sizes": (43,), "forms": ("diagonal",), "rank": 10}),
    "layer_low_rank": ("2", {"sizes": (18,), "forms": ("diagonal",), "rank": 10}),
}


@pytest.mark.parametrize("repr", STRUCTURES)
def test_each_representation_gives_its_structure(repr: str) -> None:
    block, fit = STRUCTURES[repr]
    assert observed("ggn", repr)[block].structure == Fit(**fit)


def test_every_representation_that_has_a_structure_is_tested() -> None:
    named = {r for r in representations.names() if representations.get(r)().followed}
    assert named == set(STRUCTURES)
    for r in representations.names():  # where there is none, it fits what the representation makes of the matrix
        assert cells.why_not(matrices.get("ggn")(), representations.get(r)(), PSGD()) is None
        assert (cells.resolve_kind(matrices.get("ggn")(), representations.get(r)(), PSGD()) == "pairs") is (r in STRUCTURES)


def test_dimensions_are_tiled_merged_and_left_out_as_for_other_solvers() -> None:
    tiled = observed("ggn", KronDim(max_dim=3))["0.weight"]
    assert isinstance(tiled, BlockDiagonal)
    fits = [block.structure for block in tiled.blocks.values()]
    assert sum(fit.n for fit in fits) == 20 and all(max(fit.sizes) <= 3 for fit in fits)
    assert observed("ggn", KronDim(max_dim=4, oversized="diagonal"))["0.weight"].structure == Fit((5, 4), ("diagonal", "dense"))
    assert observed("abs_hessian", KronDim(max_dim=3))["0.weight"].n == 20  # no absolute value of blocks of pairs


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)).double()


@pytest.mark.parametrize("repr", ["kron_io", "kron_dim", "diagonal", "layer_low_rank"])
def test_convolutions_norms_and_fallbacks_train(repr: str) -> None:
    model = convolutions()
    preconditioner = make("hessian", repr, "psgd", 1e-3).attach(model, CRITERION, optimizer := sgd(model, lr=0.02))
    losses = []
    x, y = draw(6, 2, 4, 4), torch.arange(6) % 3
    for _ in range(12):
        optimizer.zero_grad()
        loss = CRITERION(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for row in preconditioner.describe().rows:
        assert row.triple is not None and row.triple.endswith("psgd")
    if repr == "kron_io":
        assert preconditioner.operators["0"].structure == Fit((2, 10), ("dense", "dense"), batch=2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("matrix", "repr"), [("ggn", "kron_dim"), ("batched_empirical_fisher", "full_low_rank"), ("hessian", "diagonal")])
def test_training_goes_on_bit_by_bit_after_a_resume(matrix: str, repr: str) -> None:
    data = batches(6)
    whole = net()
    make(matrix, repr, "psgd").attach(whole, CRITERION, optimizer := sgd(whole))
    for batch in data:
        plain(whole, CRITERION, optimizer, *batch)
    first, second = net(), net()
    before = make(matrix, repr, "psgd").attach(first, CRITERION, optimizer := sgd(first))
    for batch in data[:3]:
        plain(first, CRITERION, optimizer, *batch)
    second.load_state_dict(first.state_dict())
    after = make(matrix, repr, "psgd", seed=5).attach(second, CRITERION, optimizer := sgd(second))
    after.load_state_dict(before.state_dict())
    for batch in data[3:]:
        plain(second, CRITERION, optimizer, *batch)
    assert torch.equal(theta(second), theta(whole))


def test_a_gradient_that_is_not_finite_leaves_the_fit_as_it_is() -> None:
    model = net()
    preconditioner = make("batched_empirical_fisher", "full", "psgd").attach(model, CRITERION, optimizer := sgd(model))
    (x, y), again = batches(2)
    plain(model, CRITERION, optimizer, x, y)
    kept = theta(model)
    plain(model, CRITERION, optimizer, x * torch.nan, y)
    assert torch.equal(theta(model), kept) and preconditioner.operators["model"].h.isfinite().all()  # type: ignore[attr-defined]
    plain(model, CRITERION, optimizer, *again)
    assert theta(model).isfinite().all() and not torch.equal(theta(model), kept)


# --- estimates of the diagonal


class OneTensor:
    """A block of one tensor."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.n = shape, torch.Size(shape).numel()

    def gather(self, values: dict[str, Tensor], lead: int = 0) -> Tensor:
        return values["w"].flatten(lead)


def estimated(representation: Diagonal, v: Tensor, C: Tensor, *shape: int) -> Tensor:
    """The diagonal from samples v (m, n) alone."""
    block: Any = OneTensor(*(shape or (len(C),)))
    named = {"w": v.view(-1, *block.shape)}, {"w": (v @ C).view(-1, *block.shape)}
    statistics = representation.measure("all", Probes(lambda distribution, samples: named), block, {})
    return representation.operator(statistics, block).diagonal()


def signs(n: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def test_hutchinson_is_unbiased_over_all_sign_vectors() -> None:
    C = symmetric(5)
    assert_close(estimated(Diagonal(estimator="hutchinson"), signs(5), C), C.diagonal(), **EXACT)
    assert_close(estimated(Diagonal(estimator="row_norms"), signs(5), C), (C @ C).diagonal().sqrt(), **EXACT)
    probes = 5**0.5 * torch.eye(5, dtype=torch.float64)  # E[v v^T] = I is all that is needed
    assert_close(estimated(Diagonal(estimator="row_norms"), probes, C), (C @ C).diagonal().sqrt(), **EXACT)


def test_hutchinson_is_exact_for_a_diagonal_matrix_and_for_no_other() -> None:
    d = draw(5)
    for v in signs(5)[::7]:
        assert_close(estimated(Diagonal(estimator="hutchinson"), v[None], d.diag()), d, **EXACT)
        assert_close(estimated(Diagonal(estimator="row_norms"), v[None], d.diag()), d.abs(), **EXACT)
    with pytest.raises(AssertionError):  # negative
        assert_close(estimated(Diagonal(estimator="hutchinson"), signs(5)[:1], symmetric(5)), symmetric(5).diagonal(), rtol=0.1, atol=0.1)
    with pytest.raises(AssertionError):  # negative: a normal v is not exact
        assert_close(estimated(Diagonal(estimator="hutchinson", distribution="normal"), draw(1, 5), d.diag()), d, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 3), (2, 2, 3, 2), (2, 1, 2, 3, 2)], ids=str)
def test_spatial_averages_equal_loops(shape: tuple[int, ...]) -> None:
    """|C v| averaged over the dimensions of a kernel, then squared: AdaHessian."""
    n = torch.Size(shape).numel()
    v, C = draw(2, n, seed=1).sign(), symmetric(n)
    last = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}[len(shape)]
    total = torch.zeros(n, dtype=torch.float64)
    for one in v:
        size = (C @ one).abs().view(shape)
        for place in itertools.product(*(range(k) for k in shape[: len(shape) - last])):
            size[place] = size[place].mean()
        total += size.flatten() ** 2 / 2
    assert_close(estimated(Diagonal(estimator="row_norms", spatial_average=True), v, C, *shape), total.sqrt(), **EXACT)


@pytest.mark.parametrize("matrix", ["hessian", "abs_hessian", "ggn", "gradient_covariance"])
@pytest.mark.parametrize("estimator", ["hutchinson", "row_norms"])
def test_curvature_estimates_the_diagonal(matrix: str, estimator: Any) -> None:
    x, y = batches(1)[0]
    seen = precond.curvature(net(), CRITERION, x, y, matrix=matrix, repr=Diagonal(estimator=estimator, samples=3), seed=4).diagonal()
    v = torch.cat([_signs(name, p, 3) for name, p in net().named_parameters()], 1)
    C = dense_cells.MATRICES["hessian" if matrix == "abs_hessian" else matrix](net(), CRITERION, x, y)
    expected = (v * (v @ C)).mean(0) if estimator == "hutchinson" else (v @ C).square().mean(0).sqrt()
    assert_close(seen, expected.abs() if matrix == "abs_hessian" else expected, **EXACT)
    with pytest.raises(AssertionError):  # negative: other draws
        other = precond.curvature(net(), CRITERION, x, y, matrix=matrix, repr=Diagonal(estimator=estimator, samples=3), seed=5).diagonal()
        assert_close(other, seen, rtol=1e-3, atol=1e-6)


def _signs(name: str, p: Tensor, samples: int) -> Tensor:
    generator = precond.observe.keyed_generator(torch.device("cpu"), "probes", "rademacher", 4, 0, 0, name)
    return (torch.randint(2, (samples, *p.shape), generator=generator).double() * 2 - 1).flatten(1)


def test_a_history_averages_squares_before_the_root_and_leaves_a_hutchinson_diagonal_as_it_is() -> None:
    """AdaHessian's s and Sophia's h: the average is of what adds."""
    for estimator in ("hutchinson", "row_norms"):
        single, model = [], net()
        preconditioner = make("hessian", Diagonal(estimator=estimator), "elementwise", 100.0, history=Ema(0.9))  # type: ignore[arg-type]
        preconditioner.attach(model, CRITERION, optimizer := sgd(model, lr=0.0))
        for step, batch in enumerate(batches(3)):
            plain(model, CRITERION, optimizer, *batch)
            found = observed("hessian", Diagonal(estimator=estimator), step=step, solver="elementwise")["0.weight"].diagonal()  # type: ignore[arg-type]
            single.append(found if estimator == "hutchinson" else found.square())
        average = (0.081 * single[0] + 0.09 * single[1] + 0.1 * single[2]) / 0.271
        assert_close(preconditioner.operators["0.weight"].diagonal(), average if estimator == "hutchinson" else average.sqrt(), **EXACT)


def test_weights_as_given_scale_the_estimates() -> None:
    def halved(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        (0.5 * criterion(model(x), y)).backward()
        optimizer.step()

    for estimator in ("hutchinson", "row_norms"):
        options: dict[str, Any] = {"solver": "elementwise", "repr": Diagonal(estimator=estimator)}  # type: ignore[arg-type]
        given, plainly = (observed("ggn", loop=halved, loss_weights=weights, **options)["0.weight"].diagonal() for weights in ("given", "normalised"))
        assert_close(given, plainly / 2, **EXACT)


# --- bfgs on products, and other solvers


@pytest.mark.parametrize("initial", [None, 1.0])
def test_bfgs_reaches_the_inverse_of_a_quadratic_along_conjugate_directions(initial: float | None) -> None:
    A = symmetric(4) @ symmetric(4) + torch.eye(4, dtype=torch.float64)
    directions = torch.linalg.eigh(A + 0.3 * torch.eye(4, dtype=torch.float64))[1].T
    solver, state = BFGS(initial=initial), dict[str, Any]()
    for v in directions:
        state = solver.refresh(state, Pairs(v, A @ v, "dense"), Tikhonov(0.3))
    P = solver.apply(state, torch.eye(4, dtype=torch.float64))[0]
    assert_close(P, torch.linalg.inv(A + 0.3 * torch.eye(4, dtype=torch.float64)), **EXACT)
    together = solver.init(Pairs(directions, directions @ A, "dense"), Tikhonov(0.3))  # a set of pairs is one after another
    assert_close(solver.apply(together, torch.eye(4, dtype=torch.float64))[0], P, **EXACT)


def test_bfgs_follows_blocks_and_entries() -> None:
    d = torch.tensor([2.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    v = draw(4)
    diagonal = BFGS().init(Pairs(v, d * v, "diagonal"), Tikhonov(0.0))
    assert_close(BFGS().apply(diagonal, torch.ones(4, dtype=torch.float64))[0], 1 / d, **EXACT)
    stack = BFGS().init(Pairs(v, d * v, Fit((2,), ("dense",), batch=2)), Tikhonov(0.0))
    single = [BFGS().init(Pairs(v[part], (d * v)[part], "dense"), Tikhonov(0.0)) for part in (slice(0, 2), slice(2, 4))]
    parts = [BFGS().apply(state, torch.ones(2, dtype=torch.float64))[0] for state in single]
    assert_close(BFGS().apply(stack, torch.ones(4, dtype=torch.float64))[0], torch.cat(parts), **EXACT)
    with pytest.raises(InvalidCombination, match="not a kronecker one"):
        BFGS().init(Pairs(v, v, Fit((2, 2), ("dense", "dense"))), Tikhonov(0.0))


def test_bfgs_trains_on_pairs_of_a_matrix_with_products() -> None:
    model = net()
    preconditioner = make("ggn", "layer", "bfgs", 0.1).attach(model, CRITERION, optimizer := sgd(model))
    x, y = batches(1)[0]
    before = float(CRITERION(model(x), y).detach())
    for _ in range(15):
        plain(model, CRITERION, optimizer, x, y)
    assert float(CRITERION(model(x), y).detach()) < before / 2
    assert isinstance(preconditioner.operators["0"], Pairs)


def test_solvers_that_follow_nothing_are_given_what_they_were() -> None:
    for solver in (s for s in solvers.names() if not solvers.get(s).follows):
        made = solvers.get(solver)()
        for r in representations.names():
            representation = representations.get(r)()
            for m in matrices.names():
                matrix = matrices.get(m)()
                first = next((kind for kind in representation.requests if kind in matrix.supplies), None)
                assert cells.resolve_kind(matrix, representation, made) == first
    assert cells.resolve_kind(matrices.get("ggn")(), representations.get("full")(), PSGD()) == "pairs"
    assert cells.resolve_kind(matrices.get("batched_fisher_mc")(), representations.get("full")(), PSGD()) == "whitening"
    assert cells.resolve_kind(matrices.get("bfgs_hessian")(), representations.get("full")(), BFGS()) == "secant"
    assert cells.resolve_kind(matrices.get("hessian")(), representations.get("full")(), CG()) == "product"


# --- refusals

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"matrix": "ggn", "repr": "layer", "solver": "psgd", "history": 0.9}, "use history='local'"),
    ({"matrix": "bfgs_hessian", "repr": "full", "solver": "bfgs", "history": 0.9}, "use history='local'"),
    ({"matrix": "bfgs_hessian", "repr": "full_low_rank", "solver": "bfgs", "history": 0.9}, "use history='local'"),
    ({"matrix": "ggn", "repr": "kron_eigen", "solver": "psgd", "history": 0.9}, "psgd' averages in its own state"),
    ({"matrix": "ggn", "repr": "kron_io", "solver": "bfgs", "history": 0.9}, "bfgs' averages in its own state"),
    ({"matrix": "ggn", "repr": "full", "solver": "heavy_ball", "history": 0.9}, "heavy_ball' averages in its own state"),
    ({"matrix": "empirical_fisher", "repr": "kron_io", "solver": "riemannian", "history": 0.9}, "riemannian' averages in its own state"),
    ({"matrix": "hessian", "repr": "kron_dim", "solver": "bfgs"}, "does not fit a kronecker structure"),
    ({"matrix": "input_second_moment", "repr": "full_gram", "solver": "psgd"}, "is built from columns .* gives only moments"),
    ({"matrix": "batched_empirical_fisher", "repr": Diagonal(estimator="hutchinson"), "solver": "elementwise"}, "gives only the gradient"),
    ({"matrix": "ggn", "repr": "full", "solver": "psgd", "damping": Relative(0.1)}, "a constraint, not a matrix"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_be_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCombination, match=message):
        precond.Preconditioner(**options)


def test_statistics_beside_pairs_keep_their_history() -> None:
    precond.Preconditioner(matrix="bfgs_hessian", repr="kron_io", solver="bfgs", history=0.9)
    precond.Preconditioner(matrix="ggn", repr="full", solver="cg", history=0.9)  # it starts anew, so that nothing is averaged twice


def test_options_of_the_estimates_are_checked() -> None:
    for options, message in (
        ({"estimator": "bekas"}, "choose 'exact'"), ({"distribution": "cauchy"}, "choose 'rademacher'"), ({"samples": 0}, "at least 1"),
        ({"spatial_average": True}, "use it with estimator='row_norms'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Diagonal(**options)  # type: ignore[arg-type]


def test_a_pair_is_given_to_no_solver_of_matrices() -> None:
    pairs: Operator = Pairs(draw(3), draw(3), "dense")
    with pytest.raises(InvalidCombination, match="cannot invert a Pairs"):
        Cholesky().init(pairs, Tikhonov(0.0))
    with pytest.raises(InvalidCombination, match="a constraint, not a matrix"):
        CG().apply(CG().init(pairs, Tikhonov(0.0)), draw(3), pairs)
