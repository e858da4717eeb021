"""Claims of `ggn_recursive` (KFRA), exact to 1e-10 against the loops of `dense_recursive`.

- It is the recursion of batch averages, in Linear, convolutions (stride, padding modes, dilation, groups), average pooling, positions of a
  sequence, in-place and smooth activations, nested containers, frozen layers; by `kron_io`, expand and reduce, and its projections.
- It is `ggn` in `kron_io` for one layer, for one example however deep, and for a linear network; not for several examples (the control).
- The start is exact at the last layer, also behind an activation and where the criterion sees the output rearranged.
- What is averaged adds over batches, micro-batches and term weights, and the recursion comes last: means of its results are another matrix.
  Histories over steps do average its results.
- "given" weights multiply B once, and divide AMP's scale out.
- Weights are those at the observation. Modules outside the chain are refused by name, at `attach` and in `curvature`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_recursive
import precond
from nets import CASES, Case, Reused, labels, normal, seeded
from pairs import hosts
from precond.representations import KronIO
from training import accumulate, batches, differ, fit, fit_dense, make, matrix_of, net, same

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def _repeated() -> nn.Module:
    phi = nn.Tanh()
    return nn.Sequential(nn.Linear(4, 5), phi, nn.Linear(5, 4), phi, nn.Linear(4, 3))


def _frozen(model: nn.Sequential) -> nn.Module:
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def _images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.AvgPool2d(2),
        nn.Sequential(nn.Conv2d(4, 3, 2, stride=2, padding=1, padding_mode="circular", bias=False), nn.Tanh(), nn.Dropout(0.0)),
        nn.Conv2d(3, 4, 2, dilation=1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity(), nn.Linear(4, 3),
    )  # fmt: skip


NETS: dict[str, Case] = {
    "deep": Case("deep", lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 4, bias=False),
                                                              nn.ReLU(inplace=True), nn.Linear(4, 3))), CE, normal(6, 4), labels(3, 6)),
    "images": Case("images", lambda: seeded(_images), CE, normal(4, 2, 6, 6), labels(3, 4)),
    "tokens": Case("tokens", lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Softplus(), nn.Flatten(),
                                                                  nn.Linear(6, 3))), CE, normal(4, 3, 4), labels(3, 4)),
    "positions": Case("positions", lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))), MSE,
                      normal(4, 3, 4), normal(4, 3, 2, seed=5)),
    "pixels": Case("pixels", lambda: seeded(lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 2))), CE,
                   normal(3, 2, 4, 4), labels(3, 3, 2, 2)),
    "squashed": Case("squashed", lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Sigmoid())), MSE,
                     normal(6, 4), normal(6, 3, seed=5)),
    "frozen": Case("frozen", lambda: seeded(lambda: _frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3)))),
                   CE, normal(6, 4), labels(3, 6)),
    "repeated": Case("repeated", lambda: seeded(_repeated), CE, normal(6, 4), labels(3, 6)),
    "single": Case("single", lambda: seeded(lambda: nn.Linear(4, 3)), CE, normal(6, 4), labels(3, 6)),
}  # fmt: skip


def curve(case: Case, matrix: Any = "ggn_recursive", repr: Any = "kron_io", **data: Any) -> Tensor:
    data = data or {"inputs": case.inputs, "targets": case.targets}
    return precond.curvature(case.make(), case.criterion, matrix=matrix, repr=repr, **data).to_dense()


def oracle(case: Case, reduce: bool = False) -> Tensor:
    return dense_recursive.ggn_recursive(case.make(), case.criterion, case.inputs, case.targets, reduce=reduce)


def apart(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * b.norm())


def part(case: Case, rows: slice) -> Case:
    return Case(case.name, case.make, case.criterion, case.inputs[rows], case.targets[rows])


@pytest.mark.parametrize("name", NETS)
def test_it_is_the_recursion_of_averages(name: str) -> None:
    C = NETS[name]
    want = oracle(C)
    close(curve(C), want)
    close(curve(C, repr=KronIO(sharing="reduce")), oracle(C, reduce=True))
    for repr in ("full", "layer"):
        close(curve(C, repr=repr), want)
    close(curve(C, repr="unit"), dense.project_unit(want, C.make()))


def test_the_two_ways_of_sharing_differ_where_there_are_positions() -> None:
    for name in ("images", "tokens", "positions"):
        assert apart(oracle(NETS[name], reduce=True), oracle(NETS[name]))
    assert not apart(oracle(NETS["deep"], reduce=True), oracle(NETS["deep"]))


# -- where it is exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_one_example_is_that_of_exact_columns(name: str) -> None:
    one = part(NETS[name], slice(0, 1))
    for sharing in ("expand", "reduce"):
        close(curve(one, repr=KronIO(sharing=sharing)), curve(one, "ggn", KronIO(sharing=sharing)))


def test_one_layer_and_the_last_layer_are_those_of_exact_columns() -> None:
    close(curve(NETS["single"]), curve(NETS["single"], "ggn"))
    for name in ("deep", "squashed"):
        C = NETS[name]
        (last,) = [names for layer, names in dense.layer_groups(C.make()) if layer == ("6" if name == "deep" else "2")]
        where = torch.cat([torch.arange(p.start, p.stop) for p in (dense.positions(C.make())[n] for n in last)])
        close(curve(C)[where][:, where], curve(C, "ggn")[where][:, where])


def test_a_linear_network_is_that_of_exact_columns_for_any_loss() -> None:
    for criterion, y in ((CE, labels(3, 6)), (MSE, normal(6, 3, seed=5))):
        C = Case("linear", lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))), criterion, normal(6, 4), y)
        close(curve(C), curve(C, "ggn"))


@pytest.mark.parametrize("name", ["deep", "images", "tokens", "squashed", "frozen"])
def test_several_examples_are_not_those_of_exact_columns(name: str) -> None:
    first = slice(0, dense.parameters(NETS[name].make())[0].numel())
    assert apart(curve(NETS[name])[first, first], curve(NETS[name], "ggn")[first, first])


@pytest.mark.parametrize("outputs", [1, 2])
def test_one_hidden_layer_is_exact_where_the_loss_has_a_constant_curvature(outputs: int) -> None:
    """W^T S W o phi'(h_i) phi'(h_i)^T is linear in what depends on i; two hidden layers, or another loss, are the controls."""

    def C(criterion: nn.Module, *widths: int) -> Case:
        def build() -> nn.Module:
            layers = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]
            return nn.Sequential(*layers[:-1])

        targets = normal(6, outputs, seed=5) if criterion is MSE else labels(2, 6, outputs).double()
        return Case("one", lambda: seeded(build), criterion, normal(6, 4), targets)

    close(curve(C(MSE, 4, 5, outputs)), curve(C(MSE, 4, 5, outputs), "ggn"))
    for other in (C(MSE, 4, 5, 4, outputs), C(nn.BCEWithLogitsLoss(), 4, 5, outputs)):
        assert (curve(other) - curve(other, "ggn")).norm() > 1e-4 * curve(other).norm()


# -- what adds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["deep", "images", "positions"])
def test_batches_of_unequal_sizes_are_one_batch(name: str, reduction: str) -> None:
    plain = NETS[name]
    C = Case(name, plain.make, type(plain.criterion)(reduction=reduction), plain.inputs, plain.targets)
    pieces = [part(C, s) for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    batches = [(p.inputs, p.targets) for p in pieces if len(p.inputs)]
    close(curve(C, batches=batches), curve(C))
    means = sum(curve(p) * (len(p.inputs) / len(C.inputs) if reduction == "mean" else 1.0) for p in pieces if len(p.inputs))
    assert apart(means, curve(C)), "the recursion does not add"


@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 3)])
@pytest.mark.parametrize("repr", ["kron_io", "layer"])
def test_micro_batches_are_one_batch(repr: str, sizes: tuple[int, ...]) -> None:
    one = fit(make("ggn_recursive", repr))
    same(fit(make("ggn_recursive", repr), accumulate(*sizes)), one)
    differ(one, fit(make("ggn", repr)))


def test_steps_are_those_of_dense_algebra() -> None:
    same(fit(make("ggn_recursive", "layer")), fit_dense(lambda model, x, y: dense_recursive.ggn_recursive(model, CE, x, y)))


def test_a_history_averages_its_results() -> None:
    p = make("ggn_recursive", "full", history=precond.history.Mean())
    fit(p, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    each = [dense_recursive.ggn_recursive(net(), CE, x, y) for x, y in batches(3)]
    close(matrix_of(p), sum(each) / 3)
    assert apart(matrix_of(p), dense_recursive.ggn_recursive(net(), CE, *(torch.cat(t) for t in zip(*batches(3), strict=True))))


@pytest.mark.parametrize("repr", ["kron_io", "layer"])
def test_given_weights_multiply_b_once_and_amp_is_divided_out(repr: str) -> None:
    found = {}
    for weight, amp, given in ((1.0, 1.0, False), (3.0, 1.0, False), (3.0, 1.0, True), (3.0, 64.0, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=amp)
        p = make("ggn_recursive", repr, loss_weights="given" if given else "normalised")

        def loop(model: Any, criterion: Any, optimizer: Any, x: Tensor, y: Tensor, scaler: Any = scaler, weight: float = weight) -> None:
            optimizer.zero_grad()
            scaler.scale(weight * criterion(model(x), y)).backward()
            scaler.step(optimizer)

        fit(p, loop, steps=1, scaler=scaler)
        found[weight, amp, given] = torch.block_diag(*(operator.to_dense() for operator in p.operators.values()))
    plain = found[1.0, 1.0, False]
    close(found[3.0, 1.0, False], plain)
    close(found[3.0, 1.0, True], 3 * plain)
    close(found[3.0, 64.0, True], 3 * plain)


def test_it_uses_the_weights_of_the_observation() -> None:
    C, p = NETS["deep"], make("ggn_recursive", "full")
    model = C.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    p.attach(model, C.criterion, optimizer)
    C.criterion(model(C.inputs), C.targets).backward()
    optimizer.step()
    close(matrix_of(p), oracle(C))
    assert apart(dense_recursive.ggn_recursive(model, C.criterion, C.inputs, C.targets), oracle(C))


def test_layers_that_are_frozen_pass_it_on_and_the_start_is_exact_at_the_last_that_has_it() -> None:
    C = NETS["deep"]

    def blocks(matrix: str, frozen: str | None = None, left: str | None = None) -> dict[str, Tensor]:
        model = C.make()
        if frozen is not None:
            model.get_submodule(frozen).requires_grad_(False)
        p = make(matrix, "kron_io", overrides=None if left is None else {left: None})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        p.attach(model, C.criterion, optimizer)
        C.criterion(model(C.inputs), C.targets).backward()
        optimizer.step()
        return {name: operator.to_dense() for name, operator in p.operators.items()}

    whole, exact = blocks("ggn_recursive"), blocks("ggn")
    for name, block in blocks("ggn_recursive", frozen="2").items():
        close(block, whole[name])
    headless = blocks("ggn_recursive", left="6")
    close(headless["4"], exact["4"])
    assert apart(whole["4"], exact["4"]) and apart(headless["0"], exact["0"]) and apart(headless["0"], whole["0"])


def test_a_rearranged_output_is_that_of_the_plain_one() -> None:
    C, found = NETS["positions"], []
    for view in (lambda t: t, lambda t: t.reshape(-1, 2)):
        p, model = make("ggn_recursive", "full"), C.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        p.attach(model, C.criterion, optimizer)
        C.criterion(view(model(C.inputs)), view(C.targets)).backward()
        optimizer.step()
        found.append(matrix_of(p))
    close(found[0], oracle(C))
    close(found[1], oracle(C))


# -- what is refused ---------------------------------------------------------------------------------------------------


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


class Doubled(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "custom": (Reused, r"the model \(a Reused\)"),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"module '1' \(LayerNorm\)"),
    "batch": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4))), r"module '1.0' \(BatchNorm1d\)"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 4)), r"module '1' \(Softmax\)"),
    "max": (lambda: nn.Sequential(nn.Conv1d(1, 4, 1), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 4)), r"module '1' \(MaxPool1d\)"),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)), r"module '1' \(Dropout\).*a mask.*eval"),
    "tied": (_tied, r"module '2' \(Linear\).*its weights are those of '0'"),
    "examples": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Linear(24, 4)), r"module '1' \(Flatten\).*start_dim"),
    "subclass": (lambda: nn.Sequential(nn.Linear(4, 4), Doubled(), nn.Linear(4, 4)), r"module '1' \(Doubled\)"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4)),
        r"module '0' \(ParametrizedLinear\)",
    ),
}


@pytest.mark.parametrize("name", [name for name in CASES if not hosts(name, "ggn_recursive")])
def test_cases_of_the_grids_that_are_no_chain_are_refused(name: str) -> None:
    C = CASES[name]
    with pytest.raises(precond.ObservationError, match="use the matrix 'ggn'"):
        curve(C)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_link_is_refused_by_name(name: str) -> None:
    build, what = REFUSED[name]
    message = f"(?s){what}.*use the matrix 'ggn'"
    model = seeded(build)
    with pytest.raises(precond.ObservationError, match=message):
        make("ggn_recursive", "kron_io").attach(model, CE, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(precond.ObservationError, match=message):
        precond.curvature(model, CE, normal(6, 4), labels(4, 6), matrix="ggn_recursive", repr="kron_io")


def test_dropout_is_the_identity_in_eval_and_refused_where_it_wakes_up() -> None:
    model = seeded(REFUSED["dropout"][0]).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make("ggn_recursive", "kron_io").attach(model, CE, optimizer)
    CE(model(normal(6, 4)), labels(4, 6)).backward()
    optimizer.step()
    model.train()
    with pytest.raises(precond.ObservationError, match=r"module '1' \(Dropout\)"):
        CE(model(normal(6, 4)), labels(4, 6)).backward()


def test_examples_of_other_shapes_do_not_add_and_are_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3)))
    data = [(normal(2, 1, n), labels(3, 2)) for n in (4, 5)]
    with pytest.raises(precond.ObservationError, match="differ in the shape of an example"):
        precond.curvature(model, CE, batches=data, matrix="ggn_recursive", repr="kron_io")


def test_a_single_vector_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    with pytest.raises(precond.ObservationError, match=r"layer '0' was given \(4,\).*leading dimension"):
        precond.curvature(model, MSE, normal(4), normal(3), matrix="ggn_recursive", repr="kron_io")


def test_a_loss_without_a_semi_definite_hessian_is_refused() -> None:
    model, criterion = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))), nn.GaussianNLLLoss()
    make("ggn_recursive", "kron_io").attach(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1))
    mean, variance = model(normal(6, 4)).chunk(2, 1)
    with pytest.raises(precond.ObservationError, match="no 'ggn_recursive' of it: use the matrix 'fisher'"):
        criterion(mean, normal(6, 1), variance.exp()).backward()


def test_cells_of_products_and_columns_are_refused() -> None:
    for repr in ("matrix_free", "kron_dim", "diagonal"):
        with pytest.raises(precond.InvalidCombination, match="'ggn_recursive' gives only moments of layer inputs and outputs"):
            curve(CASES["mlp"], repr=repr)
