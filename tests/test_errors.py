"""Claims about bad input: it raises at the earliest moment that can know, and one sentence says what is wrong and what to do.

Each case is a call, the class of the error, and the parts its message must have. `attach` that fails leaves no hook and may be called again.
Steps out of order are in `test_loops.py`, overrides in `test_loops_options.py`, saved states in `test_state.py`, checkpointing in
`test_loops_checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import precond
from precond import InvalidCombination, ObservationError, Preconditioner, UnknownName, UsageError
from training import batches, fit, make, net, plain, same, sgd

CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(input, target) ** 2


def new(**options: Any) -> Preconditioner:
    return Preconditioner(**{"matrix": "ggn", "repr": "kron_io", "solver": "cholesky", **options})


def refused(call: Callable[[], Any], kind: type[Exception], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and message.rstrip()[-1] in ".!", message


NAMES = {
    "matrix": (lambda: new(matrix="fisher_cm"), "'fisher_cm' is not one of the matrices", "did you mean 'fisher_mc'?", "There are: ", "hessian"),
    "repr": (lambda: new(repr="kronio"), "is not one of the representations", "did you mean 'kron_io'?", "diagonal"),
    "solver": (lambda: new(solver="choleski"), "is not one of the solvers", "did you mean 'cholesky'?", "cg"),
    "far": (lambda: new(matrix="zzz"), "'zzz' is not one of the matrices. There are: "),
    "recipe": (lambda: precond.recipe("kffac"), "'kffac' is not a recipe", "did you mean 'kfac'?", "ends in .toml"),
    "history": (lambda: new(history="locl"), "did you mean 'local'?"),
    "likelihood": (lambda: new().attach(net(), "categoricl"), "did you mean 'categorical'?"),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_name_gets_the_closest_and_all_there_are(name: str) -> None:
    call, *parts = NAMES[name]
    refused(call, UnknownName, *parts)


CELLS = {
    "not_built": (lambda: new(matrix="hessian"), "'kron_io' is built from columns (a, g)", "gives only products", "The nearest valid choice is"),
    "not_taken": (lambda: new(repr="diagonal"), "solver 'cholesky' takes", "makes a Diagonal", "nearest valid choice", "solver='elementwise'"),
    "no_power": (
        lambda: new(matrix="hessian", repr="full", solver=precond.solvers.Eigen(power=0.5)),
        "'hessian' is indefinite and has no real power -0.5", "use power=1",
    ),
    "live_history": (lambda: new(repr="matrix_free", solver="cg", history=0.9), "'matrix_free'", "use history='local'"),
    "live_interval": (lambda: new(repr="matrix_free", solver="cg", curvature_interval=2), "curvature_interval and solver_interval must be 1"),
    "damping": (
        lambda: new(repr="matrix_free", solver="cg", damping=precond.damping.Factored(0.1)), "Factored damping needs Kronecker factors", "use Tikhonov",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_an_invalid_cell_gets_the_reason_and_what_to_choose(name: str) -> None:
    call, *parts = CELLS[name]
    refused(call, InvalidCombination, *parts)


def test_the_nearest_valid_choice_is_valid() -> None:
    """For each pair of two axes once: with all three the message would be the same, 1,500 times."""
    seen: set[tuple[str, str]] = set()
    for cell in precond.combinations():
        pairs = {(cell.matrix, cell.repr), (cell.repr, cell.solver)}
        if not cell.valid and not pairs <= seen:
            seen |= pairs
            with pytest.raises(InvalidCombination) as caught:
                new(matrix=cell.matrix, repr=cell.repr, solver=cell.solver)
            assert cell.reason in str(caught.value)
            choice = str(caught.value).partition("nearest valid choice is ")[2].rstrip(".")
            new(**dict(part.split("=") for part in choice.replace("'", "").split(", ")))


OPTIONS = {
    "interval_0": (lambda: new(curvature_interval=0), ValueError, "at least 1 step", "lambda step: False"),
    "interval_float": (lambda: new(solver_interval=1.5), TypeError, "a number of steps, or a function", "1.5"),
    "start": (lambda: new(start_step=-1), ValueError, "start_step=-1", "0 or more"),
    "weights": (lambda: new(loss_weights="mean"), ValueError, "loss_weights='mean'", "'normalised'", "'given'"),
    "nonfinite": (lambda: new(on_nonfinite="ignore"), ValueError, "on_nonfinite='ignore'", "'zero'", "'skip'", "'raise'"),
    "rows": (lambda: new(rows={"0": "third"}), ValueError, "'third'", "'flattened'", "'second'"),
    "damping_negative": (lambda: new(damping=-1.0), ValueError, "at least 0", "1e-3"),
    "damping_nan": (lambda: new(damping=float("nan")), ValueError, "finite"),
    "damping_kind": (lambda: new(damping="1e-3"), TypeError, "a number or an object of precond.damping", "str"),
    "history_1": (lambda: new(history=1.0), ValueError, "in (0, 1)", "'local'"),
    "history_kind": (lambda: new(history=[1]), TypeError, "an object of precond.history", "list"),
    "axis_kind": (lambda: new(matrix=3), TypeError, "by its name or an instance, not by a int", "ggn"),
    "samples": (lambda: precond.matrices.FisherMC(samples=0), ValueError, "at least one label"),
    "sharing": (lambda: precond.representations.KronIO(sharing="none"), ValueError, "'expand' or 'reduce'"),
    "graft": (lambda: precond.transforms.Graft("lion"), ValueError, "choose one of sgd"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option_says_what_is_allowed(name: str) -> None:
    call, kind, *parts = OPTIONS[name]
    refused(call, kind, *parts)


def frozen() -> nn.Module:
    return net().requires_grad_(False)


ATTACH = {
    "no_parameters": (lambda: new().attach(frozen(), CE()), UsageError, "no trainable parameters", "requires_grad is False", "nothing to precondition"),
    "no_criterion": (lambda: new().attach(net()), UsageError, "'ggn' is made of the criterion's calls", "attach(model, criterion, optimizer)", "observe(loss"),
    "another_kind": (lambda: new().attach(net(), nn.HingeEmbeddingLoss()), ObservationError, "is a HingeEmbeddingLoss", "nn.CrossEntropyLoss"),
    "a_function": (lambda: new().attach(net(), torch.nn.functional.cross_entropy), ObservationError, "which is not a module", "observe(loss, output, target)"),
    "one_of_a_list": (lambda: new().attach(net(), [CE(), nn.L1Loss()]), ObservationError, "L1Loss"),
    "negative": (lambda: new().attach(net(), CE(weight=-torch.ones(3))), ObservationError, "(weight=...) holds negative numbers"),
    "pos_weight": (lambda: new().attach(net(), BCE(pos_weight=-torch.ones(3))), ObservationError, "(pos_weight=...) holds negative numbers"),
    "derived": (lambda: new().attach(net(), Focal()), ObservationError, "Focal computes another loss than nn.CrossEntropyLoss", "observe(loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACH)
def test_attach_refuses_what_it_cannot_watch(name: str) -> None:
    call, kind, *parts = ATTACH[name]
    refused(call, kind, *parts)


def test_an_attach_that_failed_leaves_no_hook_and_may_be_repeated() -> None:
    model, criterion, preconditioner = net(), CE(), make()
    optimizer = sgd(model)
    for arguments in ((frozen(), criterion, optimizer), (model, None, optimizer), (model, nn.L1Loss(), optimizer)):
        with pytest.raises(precond.PrecondError):
            preconditioner.attach(*arguments)
    assert not model._forward_hooks and not criterion._forward_hooks and not optimizer._optimizer_step_pre_hooks
    preconditioner.attach(model, criterion, optimizer)
    for x, y in batches():
        plain(model, criterion, optimizer, x, y)
    same(model, fit(make()))


def functional_loss(model: nn.Module, criterion: nn.Module, optimizer: Any, x: Any, y: Any) -> None:
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def another_criterion(model: nn.Module, criterion: nn.Module, optimizer: Any, x: Any, y: Any) -> None:
    plain(model, CE(), optimizer, x, y)


def a_copy(model: nn.Module, criterion: nn.Module, optimizer: Any, x: Any, y: Any) -> None:
    h = torch.tanh(model[0](x))  # not a forward pass of the model
    criterion(model[2](h), y).backward()
    optimizer.step()


@pytest.mark.parametrize("loop", [functional_loss, another_criterion, a_copy])
def test_a_loss_that_was_never_seen_is_refused_at_the_step(loop: Any) -> None:
    refused(lambda: fit(make(), loop), UsageError, "differentiated no loss that the preconditioner saw", "attached criterion", "observe(loss, output, target)")


@pytest.mark.parametrize("kind", ["shampoo", "adam"])
def test_what_needs_no_criterion_needs_no_loss_either(kind: str) -> None:
    from training import KINDS

    same(fit(KINDS[kind](), functional_loss, steps=1), fit(KINDS[kind](), steps=1))
    KINDS[kind]().attach(net())


def test_observe_without_a_likelihood_or_of_a_foreign_output_is_refused() -> None:
    x, y = batches(1)[0]
    preconditioner, foreign = make("batched_empirical_fisher", "full").attach(net()), net()(x)
    refused(lambda: preconditioner.observe(foreign.sum(), foreign, y), UsageError, "what the loss stands for", "a likelihood or its name")
    preconditioner = make().attach(net(), "categorical")
    refused(lambda: preconditioner.observe(foreign.sum(), foreign, y), UsageError, "no forward pass of the attached model")


def test_a_criterion_on_several_forward_passes_is_refused() -> None:
    model, criterion = net(), CE()
    _held = make().attach(model, criterion)
    x, y = batches(1)[0]
    refused(lambda: criterion(model(x) + model(x), y), ObservationError, "several forward passes", "add the losses")


def test_a_batch_changed_in_place_is_refused_where_it_is_read_again() -> None:
    def changing(model: nn.Module, criterion: nn.Module, optimizer: Any, x: Any, y: Any) -> None:
        x = x.clone()
        loss = criterion(model(x), y)
        loss.backward() if first else None
        x.zero_()
        optimizer.step()

    first = True
    refused(lambda: fit(make(repr="matrix_free", solver="cg"), changing), ObservationError, "changed in place", "clone the batch")
    refused(lambda: fit(make("empirical_fisher"), changing), ObservationError, "'0' was changed in place", "clone it first", "overrides={'0': None}")


def test_a_projection_of_the_output_has_no_replay() -> None:
    model, criterion = net(), CE()
    make(repr="matrix_free", solver="cg").attach(model, criterion)
    x, y = batches(1)[0]
    refused(lambda: criterion(2 * model(x), y), ObservationError, "not a rearrangement of the model's output", "need no replay")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: precond.representations.KronDim(modes=1), r"KronDim\(modes=1\): give numbers of dimensions, such as \(0,\)"),  # type: ignore[arg-type]
        (lambda: precond.damping.PerFactor(1.0, only=1), r"PerFactor\(only=1\): it is a list of the numbers of factors"),  # type: ignore[arg-type]
    ],
)
def test_a_bare_number_where_several_belong_is_told(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
