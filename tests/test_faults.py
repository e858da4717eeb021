"""Claims about random fault schedules: 50 of them here, 1,000 in `make test-full`, each a seeded run of a small network in float32.

A schedule draws a method and, for some of its steps, a fault: NaN or Inf in the inputs, in the loss, in a gradient; a spike of 1e30 in inputs or in a
gradient; statistics that are not finite or not positive definite; an eigendecomposition or a Cholesky factorisation that raises or gives NaN;
conjugate gradients that break down; a dead layer; gradients that underflow in float16. Whatever the schedule:

- no parameter, statistic, solver state or transform ever holds a value that is not finite;
- every fault that hides something is counted by the counter that belongs to it;
- once the faults are over, training recovers: the loss falls below the one before them.

Negative control: the same faults in plain SGD leave parameters that are not finite.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from nets import labels, normal, seeded
from precond import Preconditioner, SolverFailure, solvers
from precond.blockstate import BlockState
from precond.damping import LevenbergMarquardt
from precond.operators import Operator
from training import sgd, theta

FAULTY, RECOVERY = 8, 12  # steps with faults among them, and without
DATA = [(normal(8, 4, seed=10 + k).float(), labels(3, 8, seed=50 + k)) for k in range(3)]

CLIP = [precond.transforms.NormClip(1.0)]
METHODS: dict[str, Callable[[], Preconditioner]] = {
    "kfac": lambda: precond.recipe("kfac", seed=0, damping=0.1, solver_interval=2, history=0.5),
    "ekfac": lambda: precond.recipe("ekfac", seed=0, damping=0.1, history=0.5, transforms=CLIP),
    "shampoo": lambda: precond.recipe("shampoo", seed=0, solver_interval=1, transforms=CLIP),
    "adam": lambda: precond.recipe("adam", seed=0, transforms=CLIP),
    "natural_gradient": lambda: precond.recipe("natural_gradient", seed=0, damping=0.1, transforms=CLIP),
    "layer": lambda: _make("empirical_fisher", "layer", "cholesky", history=0.5),
    "eigen": lambda: _make("ggn", "kron_io", "eigen", history=0.5),
    "smw": lambda: _make("empirical_fisher", "layer_gram", "smw"),
    "hessian_free": lambda: _make("ggn", "matrix_free", solvers.CG(max_iterations=10, negative_curvature="raise")),
    "levenberg": lambda: _make("ggn", "layer", "cholesky", damping=LevenbergMarquardt(0.1)),
    "grafted": lambda: _make("ggn", "kron_io", "cholesky", history=0.5, transforms=[precond.transforms.Graft("rmsprop", beta=0.5), *CLIP]),
    "lu": lambda: _make("ggn", "layer", "lu", history=0.5),
    "newton_schulz": lambda: _make("ggn", "kron_io", "newton_schulz", history=0.5),
    "qr_iteration": lambda: _make("ggn", "kron_io", "qr_iteration", history=0.5),
    "sparse_cholesky": lambda: _make("ggn", "layer_sparse", "sparse_cholesky", history=0.5),
    "krylov": lambda: _make("ggn", "matrix_free", solvers.Krylov(steps=10)),
    "neumann": lambda: _make("ggn", "layer", "neumann", damping=1.0),
    "heavy_ball": lambda: _make("ggn", "layer", "heavy_ball", damping=1.0),
    "bfgs": lambda: _make("bfgs_hessian", "layer", "bfgs", damping=1.0),
    "bfgs_products": lambda: _make("ggn", "kron_io", "bfgs"),
    "psgd": lambda: _make("ggn", "kron_io", "psgd", damping=0.3),
    "psgd_products": lambda: _make("ggn", "layer_gram", "psgd", damping=1.0),
    "riemannian": lambda: _make("ggn", "kron_io", solvers.Riemannian(method="ikfac", step=0.3), damping=1.0),
    "momenta": lambda: _make("ggn", "diagonal", "elementwise", transforms=[precond.transforms.Momentum(0.5), *CLIP]),
}


def _make(matrix: str, repr: str, solver: Any, **options: Any) -> Preconditioner:
    return Preconditioner(matrix=matrix, repr=repr, solver=solver, **{"damping": 0.1, "seed": 0, "transforms": CLIP, **options})


class Breaking:
    """One run, with what a fault may reach for."""

    def __init__(self, method: str) -> None:
        self.model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).float()
        self.criterion, self.optimizer = nn.CrossEntropyLoss(), sgd(self.model, 0.05)
        self.preconditioner = METHODS[method]().attach(self.model, self.criterion, self.optimizer)

    def step(self, x: Tensor, y: Tensor, factor: float = 1.0, spoil: Callable[[nn.Module], None] = lambda model: None) -> None:
        self.optimizer.zero_grad()
        (self.criterion(self.model(x), y) * factor).backward()
        spoil(self.model)
        self.optimizer.step()

    def loss(self) -> float:
        with torch.no_grad():
            return float(sum(self.criterion(self.model(x), y) for x, y in DATA))


def _inputs(value: float) -> Callable[[Breaking, Tensor, Tensor], None]:
    def fault(run: Breaking, x: Tensor, y: Tensor) -> None:
        x = x.clone()
        x[0, 0] = value
        run.step(x, y)

    return fault


def _loss(value: float) -> Callable[[Breaking, Tensor, Tensor], None]:
    return lambda run, x, y: run.step(x, y, factor=value)


def _gradient(value: float) -> Callable[[Breaking, Tensor, Tensor], None]:
    def spoil(model: nn.Module) -> None:
        model[0].weight.grad[0, 0] = value

    return lambda run, x, y: run.step(x, y, spoil=spoil)


def _underflow(run: Breaking, x: Tensor, y: Tensor) -> None:
    """What float16 leaves of a gradient of 1e-9: zeros and denormal numbers."""

    def spoil(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad.copy_((p.grad * 1e-7).half())

    run.step(x, y, spoil=spoil)


def _dead(run: Breaking, x: Tensor, y: Tensor) -> None:
    run.step(torch.zeros_like(x), y, spoil=lambda model: [p.grad.zero_() for p in model[0].parameters()])


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _operators(change: Callable[[Operator], Operator]) -> Callable[[Breaking, Tensor, Tensor], None]:
    """A change of every operator that a refresh sees."""
    made = BlockState.operator

    def fault(run: Breaking, x: Tensor, y: Tensor) -> None:
        with _patched(BlockState, "operator", lambda self: change(made(self))):
            run.step(x, y)

    return fault


def _scaled(factor: float) -> Callable[[Operator], Operator]:
    def change(operator: Operator) -> Operator:
        if operator.live:
            return precond.operators.MatrixFree(lambda v: factor * (operator @ v), operator.n, operator.dtype, operator.device)
        return type(operator).from_fields({n: _times(v, factor) for n, v in operator.fields().items()})

    return change


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, Tensor):
        return value * factor if value.is_floating_point() else value
    if isinstance(value, Operator):
        return _scaled(factor)(value)
    return {n: _times(v, factor) for n, v in value.items()} if isinstance(value, dict) else value


def _raising(names: tuple[str, ...], nan: bool) -> Callable[[Breaking, Tensor, Tensor], None]:
    """Functions of torch.linalg that raise, or give NaN."""

    def broken(old: Any) -> Any:
        def call(A: Tensor, *args: Any, **options: Any) -> Any:
            if not nan:
                raise torch.linalg.LinAlgError("injected")
            first, second = old(torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A), *args, **options)
            return first * torch.nan, second

        return call

    def fault(run: Breaking, x: Tensor, y: Tensor) -> None:
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(_patched(torch.linalg, name, broken(getattr(torch.linalg, name))))
            run.step(x, y)

    return fault


def _breakdown(run: Breaking, x: Tensor, y: Tensor) -> None:
    """A solve that fails where it is applied, as conjugate gradients do."""
    with contextlib.ExitStack() as stack:
        for cls in {type(block.plan.solver) for block in run.preconditioner._session.blocks}:
            stack.enter_context(_patched(cls, "_apply", _fail))
        run.step(x, y)


def _fail(*args: Any) -> Any:
    raise SolverFailure("injected")


STOPPED = ("directions_zeroed", "solves_failed")  # nothing moves
# the fault, and the counters of which one at least must count it; none where it may be harmless
FAULTS: dict[str, tuple[Callable[[Breaking, Tensor, Tensor], None], tuple[str, ...]]] = {
    "nan_input": (_inputs(float("nan")), STOPPED), "inf_input": (_inputs(float("inf")), STOPPED),
    "nan_loss": (_loss(float("nan")), STOPPED), "inf_loss": (_loss(float("inf")), STOPPED),
    "nan_gradient": (_gradient(float("nan")), STOPPED), "inf_gradient": (_gradient(-float("inf")), STOPPED),
    "spike_gradient": (_gradient(1e30), STOPPED), "spike_input": (_inputs(1e30), ()), "spike_loss": (_loss(1e30), STOPPED),
    "nan_statistics": (_operators(_scaled(float("nan"))), ()), "indefinite": (_operators(_scaled(-3.0)), ()), "zero": (_operators(_scaled(0.0)), ()),
    "huge_statistics": (_operators(_scaled(1e30)), ()), "raising": (_raising(("eigh", "cholesky_ex"), False), ()),
    "nan_factors": (_raising(("eigh", "cholesky_ex"), True), ()), "breakdown": (_breakdown, ("solves_failed",)), "underflow": (_underflow, ()),
    "dead": (_dead, ()),
}  # fmt: skip


def leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)


def due(run: Breaking, name: str) -> tuple[str, ...]:
    """The counters of a fault; a solver that has no state yet, as before the first pair, cannot break down."""
    applied = all(block.state is not None for block in run.preconditioner._session.blocks)
    return FAULTS[name][1] if applied or name != "breakdown" else ()


def survive(seed: int) -> None:
    """One schedule."""
    draw = random.Random(seed)
    method = draw.choice(list(METHODS))
    schedule = [draw.choice(list(FAULTS)) if draw.random() < 0.5 else None for _ in range(FAULTY)]
    for k in range(3, FAULTY):
        if all(schedule[k - 3 : k]):  # a fourth failure in a row raises, by design: `test_failure_ladder.py`
            schedule[k] = None
    run, told = Breaking(method), f"seed {seed}: {method}, {schedule}"
    diagnostics, before = run.preconditioner.diagnostics, run.loss()
    for k, name in enumerate([*schedule, *[None] * RECOVERY]):
        x, y = DATA[k % len(DATA)]
        counted = dict(diagnostics)
        if name is None:
            run.step(x, y)
        else:
            counters = due(run, name)
            FAULTS[name][0](run, x, y)
            assert not counters or any(diagnostics[c] > counted[c] for c in counters), f"{told}: {name} at step {k} was not counted"
        assert all(bool(t.isfinite().all()) for t in (theta(run.model), *leaves(run.preconditioner.state_dict()))), f"{told}: step {k}"
    assert diagnostics["steps"] == FAULTY + RECOVERY, told
    # a spike that is finite stays in a momentum of 0.5 for a hundred steps, and turns each of them until then
    if (method, "spike_gradient" in schedule) != ("momenta", True):
        assert run.loss() < before, f"{told}: the loss went from {before} to {run.loss()}"
    run.preconditioner.remove()


@pytest.mark.parametrize("seed", range(50))
def test_a_schedule_of_faults(seed: int) -> None:
    survive(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50, 1000))
def test_more_schedules_of_faults(seed: int) -> None:
    survive(seed)


def test_every_solver_is_among_the_methods() -> None:
    found = {triple.solver.name for make in METHODS.values() for triple in [make().triple]}
    assert found == set(solvers.names())


@pytest.mark.parametrize("method", METHODS)
def test_every_fault_alone(method: str) -> None:
    """None of them hides behind another: a clean step before it and after it."""
    for name, (fault, counters) in FAULTS.items():
        run = Breaking(method)
        run.step(*DATA[0])
        counted = dict(run.preconditioner.diagnostics)
        fault(run, *DATA[1])
        diagnostics = run.preconditioner.diagnostics
        assert not counters or any(diagnostics[c] > counted[c] for c in counters), name
        old = theta(run.model)
        run.step(*DATA[2])
        assert bool(theta(run.model).isfinite().all()) and not torch.equal(theta(run.model), old), name
        run.preconditioner.remove()


@pytest.mark.parametrize("name", ["nan_input", "inf_loss", "nan_gradient"])
def test_the_same_fault_ends_plain_training(name: str) -> None:
    run = Breaking("layer")
    run.preconditioner.remove()
    FAULTS[name][0](run, *DATA[0])
    assert not bool(theta(run.model).isfinite().all())
