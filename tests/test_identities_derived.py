"""Identities of the matrices derived from others (float64, 1e-10), each with a case in which it does not hold.

Numbers are those of the list of identities: 4 (|H|), 5 (covariance and empirical Fisher), 6 (a gradient at drawn labels), 9 (what is not
linear comes last), 16 (moments of inputs and squares). And: accumulation, the average of a covariance, layers without inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_derived
import precond
from nets import CASES, Case, labels, normal, seeded
from precond.likelihoods import Categorical
from precond.matrices import AbsHessian
from precond.operators import Dense
from training import accumulate, batches, differ, fit, fit_dense, make, matrix_of, net, same

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def curve(case: Case, matrix: Any, repr: Any = "full", **data: Any) -> Tensor:
    data = data or {"inputs": case.inputs, "targets": case.targets}
    return precond.curvature(case.make(), case.criterion, matrix=matrix, repr=repr, seed=3, **data).to_dense()


def apart(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * b.norm())


def case(build: Any, criterion: nn.Module, x: Tensor, y: Tensor) -> Case:
    return Case("here", lambda: seeded(build), criterion, x, y)


# -- 4 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repr", ["full", "layer", "unit", "diagonal"])
@pytest.mark.parametrize("name", ["mlp", "mse", "transformer"])
def test_4_the_absolute_hessian_has_the_square_of_the_hessian_and_no_negative_eigenvalue(name: str, repr: str) -> None:
    M, H = curve(CASES[name], "abs_hessian", repr), curve(CASES[name], "hessian", repr)
    close(M @ M, H @ H)
    assert torch.linalg.eigvalsh(M).min() > -1e-12
    indefinite = torch.linalg.eigvalsh(H).min() < -1e-6
    assert apart(M, H) == indefinite
    assert indefinite or repr != "full"


def test_4_it_is_the_hessian_where_that_is_semi_definite() -> None:
    convex = case(lambda: nn.Linear(4, 3), CE, normal(6, 4), labels(3, 6))
    for repr in ("full", "unit", "diagonal"):
        close(curve(convex, "abs_hessian", repr), curve(convex, "hessian", repr))


def test_4_it_does_not_change_with_the_sign() -> None:
    H = curve(CASES["mlp"], "hessian")
    close(AbsHessian().finish(Dense(-H)).to_dense(), AbsHessian().finish(Dense(H)).to_dense())


def test_4_products_are_exact_with_enough_steps_and_not_with_few() -> None:
    C, v = CASES["mlp"], normal(64)
    want = dense_derived.absolute(dense.hessian(C.make(), C.criterion, C.inputs, C.targets)) @ v
    for steps, exact in ((64, True), (3, False)):
        got = precond.curvature(C.make(), C.criterion, C.inputs, C.targets, matrix=AbsHessian(steps=steps), repr="matrix_free") @ v
        close(got, want) if exact else differ(got, want, 1e-3)
    with pytest.raises(ValueError, match="at least one step"):
        AbsHessian(steps=0)


# -- 5 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "mse"])
def test_5_the_covariance_is_the_empirical_fisher_less_the_mean_gradients_square(name: str) -> None:
    M, E, g = (curve(CASES[name], m) for m in ("gradient_covariance", "empirical_fisher", "batched_empirical_fisher"))
    close(M, E - g)
    assert apart(M, E)
    assert torch.linalg.matrix_rank(E - M, rtol=1e-9, hermitian=True) == 1
    assert torch.linalg.eigvalsh(M).min() > -1e-12


@pytest.mark.parametrize("repr", ["full", "layer", "unit", "diagonal", "matrix_free"])
def test_5_it_is_the_empirical_fisher_where_the_mean_gradient_is_zero(repr: str) -> None:
    """Zero weights give equal probabilities; with every label once at every input the gradients then add up to zero."""

    def made() -> nn.Module:
        model = seeded(lambda: nn.Linear(4, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        return model

    C = Case("flat", made, CE, normal(2, 4).repeat_interleave(3, 0), torch.arange(3).repeat(2))
    assert curve(C, "batched_empirical_fisher").abs().max() < 1e-30
    want = curve(C, "empirical_fisher", repr)
    close(curve(C, "gradient_covariance", repr), want)
    assert want.norm() > 0.1


# -- 6 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3,), (1, 2)])
def test_6_the_mean_over_all_labels_of_a_gradients_square_is_the_fisher_matrix(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """N g g^T, over all C^N labels, also where the batch comes in parts; weighted uniformly, with N = 1 or at the data's labels it is not."""
    C = case(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), CE, normal(3, 2), labels(3, 3))
    p, queue = dense.predict(C.make(), C.inputs).softmax(1), iter(())

    def sample(this: Categorical, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        return this.gradient(output, torch.tensor([next(queue) for _ in output]))

    monkeypatch.setattr(Categorical, "sample", sample)
    data = list(zip(C.inputs.split(sizes), C.targets.split(sizes), strict=True))
    expectation, uniform = torch.zeros(21, 21, dtype=torch.float64), torch.zeros(21, 21, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=3):
        queue: Iterator[int] = iter(drawn)
        M = curve(C, "batched_fisher_mc", batches=data)
        assert next(queue, None) is None
        probability = p[torch.arange(3), torch.tensor(drawn)].prod()
        expectation, uniform = expectation + probability * M, uniform + M / 27
    want = dense.fisher(C.make(), CE, C.inputs, C.targets)
    close(expectation, want)
    assert apart(uniform, want) and apart(expectation / 3, want)
    assert apart(3 * curve(C, "batched_empirical_fisher"), want)


def test_6_it_has_rank_one_and_the_trace_of_the_squared_gradient() -> None:
    C = CASES["mlp"]
    M, g = curve(C, "batched_empirical_fisher"), dense.gradient(C.make(), C.criterion, C.inputs, C.targets)
    close(M.trace(), g @ g)
    for each in (M, curve(C, "batched_fisher_mc")):
        assert torch.linalg.matrix_rank(each, rtol=1e-10, hermitian=True) == 1


# -- 9 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repr", ["full", "layer", "diagonal", "matrix_free"])
def test_9_the_absolute_value_is_taken_of_the_mean(repr: str) -> None:
    C = CASES["mse"]
    parts = [(C.inputs[s], C.targets[s]) for s in (slice(0, 1), slice(1, 3), slice(3, 6))]
    each = [dense.hessian(C.make(), C.criterion, x, y) for x, y in parts]
    project = {"layer": lambda M: dense.project_layer(M, C.make()), "diagonal": dense.project_diagonal}.get(repr, lambda M: M)
    mean = sum(len(x) / 6 * project(H) for (x, _), H in zip(parts, each, strict=True))
    got = curve(C, AbsHessian(steps=len(mean)), repr, batches=parts)
    close(got, dense_derived.absolute(mean))
    assert apart(got, sum(len(x) / 6 * dense_derived.absolute(project(H)) for (x, _), H in zip(parts, each, strict=True)))


# -- 16 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "shape", "factor"), [("mean", (6,), 2 / 3), ("sum", (6,), 2 * 6), ("mean", (6, 5), 2 / 3), ("sum", (6, 5), 2 * 6 * 5)]
)
def test_16_one_layer_with_squares_has_the_moments_of_its_inputs(reduction: str, shape: tuple[int, ...], factor: float) -> None:
    """C = 3 outputs, N = 6 examples, S = 5 positions: 2 / C for a mean, 2 N S for a sum."""
    C = case(lambda: nn.Linear(4, 3), nn.MSELoss(reduction=reduction), normal(*shape, 4), normal(*shape, 3))
    close(curve(C, "ggn"), factor * curve(C, "input_second_moment"))


def test_16_not_with_cross_entropy_or_below_another_layer() -> None:
    for C in (case(lambda: nn.Linear(4, 3), CE, normal(6, 4), labels(3, 6)), CASES["mse"]):
        G, M = curve(C, "ggn", "layer"), curve(C, "input_second_moment", "layer")
        assert apart(G / G.norm(), M / M.norm())


# -- loops -------------------------------------------------------------------------------------------------------------

LOOPS = {"gradient_covariance": "layer", "input_second_moment": "kron_io", "abs_hessian": "full"}


@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 3)])
@pytest.mark.parametrize("matrix", LOOPS)
def test_accumulated_micro_batches_are_one_batch(matrix: str, sizes: tuple[int, ...]) -> None:
    one = fit(make(matrix, LOOPS[matrix]))
    same(fit(make(matrix, LOOPS[matrix]), accumulate(*sizes)), one)
    differ(one, fit(make("ggn", LOOPS[matrix])))


def test_steps_are_those_of_dense_algebra() -> None:
    def covariance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return dense.project_layer(dense_derived.gradient_covariance(model, CE, x, y), model)

    same(fit(make("gradient_covariance", "layer")), fit_dense(covariance))
    same(fit(make("abs_hessian", "full")), fit_dense(lambda model, x, y: dense_derived.abs_hessian(model, CE, x, y)))
    same(fit(make("input_second_moment", "layer")), fit_dense(lambda model, x, y: dense_derived.input_second_moment(model, None, x)))


def test_steps_by_products_with_a_covariance_are_those_of_dense_algebra() -> None:
    exact = precond.solvers.CG(tolerance=1e-13, max_iterations=100)
    by_products = fit(make("gradient_covariance", "matrix_free", exact))
    same(by_products, fit_dense(lambda model, x, y: dense_derived.gradient_covariance(model, CE, x, y)))
    differ(by_products, fit(None))
    differ(by_products, fit(make("empirical_fisher", "matrix_free", exact)))


def ema(values: list[Tensor], beta: float = 0.5) -> Tensor:
    """The bias-corrected average, the last value the newest."""
    weights = [beta ** (len(values) - 1 - k) for k in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("repr", ["full", "diagonal"])
def test_the_average_of_a_covariance_is_centred_at_the_average_gradient(repr: str) -> None:
    """EMA(M) - EMA(f) EMA(f)^T, which is not the average of covariances."""
    p = make("gradient_covariance", repr, "elementwise" if repr == "diagonal" else "cholesky", history=0.5)
    fit(p, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    model = net()
    second = ema([dense.empirical_fisher(model, CE, x, y) for x, y in batches(3)])
    first = ema([dense.gradient(model, CE, x, y) for x, y in batches(3)])
    want, other = second - torch.outer(first, first), ema([dense_derived.gradient_covariance(model, CE, x, y) for x, y in batches(3)])
    assert apart(want, other)
    if repr == "full":
        close(matrix_of(p), want)
    else:
        close(torch.cat([operator.diagonal() for operator in p.operators.values()]), want.diagonal())


def test_the_average_of_the_absolute_hessian_is_that_of_the_average() -> None:
    p = make("abs_hessian", "full", history=0.5)
    fit(p, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    each = [dense.hessian(net(), CE, x, y) for x, y in batches(3)]
    close(matrix_of(p), dense_derived.absolute(ema(each)))
    assert apart(matrix_of(p), ema([dense_derived.absolute(H) for H in each]))


@pytest.mark.parametrize("repr", ["full", "layer", "unit", "kron_io"])
def test_a_layer_that_was_not_called_has_no_moment_and_takes_none_from_others(repr: str) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    C = case(Skipping, CE, normal(6, 4), labels(3, 6))
    M, alone = (
        curve(C, "input_second_moment", repr),
        curve(case(lambda: nn.Linear(4, 3), CE, C.inputs, C.targets), "input_second_moment", repr),
    )
    close(M[:15, :15], alone)
    assert alone.any() and not M[15:].any() and not M[:, 15:].any()


# -- layers without inputs ---------------------------------------------------------------------------------------------

LEFT = {
    "bn_train": (["1"], "it has none"),
    "lstm": (["lstm"], "it has none"),
    "mha": (["attention"], "it has none"),
    "transformer": (["embedding", "norm1", "norm2", "norm3"], "tied between layers of different kinds|it has none"),
}


@pytest.mark.parametrize("repr", ["full", "layer", "unit", "kron_io"])
@pytest.mark.parametrize("name", LEFT)
def test_layers_without_inputs_are_left_with_a_warning_and_strict_refuses_them(name: str, repr: str) -> None:
    C, (layers, why) = CASES[name], LEFT[name]
    with pytest.warns(UserWarning, match="keeps its plain gradient") as caught:
        M = curve(C, "input_second_moment", repr)
    said = [str(w.message) for w in caught if "keeps its plain gradient" in str(w.message)]
    assert sorted(s.split("'")[1] for s in said) == sorted(layers)
    places = dense.positions(C.make())
    for layer, names in dense.layer_groups(C.make()):
        for parameter in names:
            assert bool(M[places[parameter]].any()) == (layer not in layers)
    with pytest.raises(precond.InvalidCombination, match=f"cannot be preconditioned: .*({why}).*overrides="):
        precond.curvature(C.make(), C.criterion, C.inputs, C.targets, matrix="input_second_moment", repr=repr, strict=True)


def test_a_layer_that_is_left_keeps_its_gradient() -> None:
    C = CASES["bn_train"]
    model, plain = C.make(), C.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match="layer '1' keeps its plain gradient"):
        make("input_second_moment", "kron_io").attach(model, C.criterion, optimizer)
    for each in (model, plain):
        C.criterion(each(C.inputs), C.targets).backward()
    optimizer.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) == name.startswith("1."), name
