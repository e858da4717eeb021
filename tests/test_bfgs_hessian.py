"""Claims about `bfgs_hessian`: exact to 1e-10 against plain loops that update B pair by pair.

- Pairs: the change of one batch's gradient by replay, H s, and the difference of successive gradients; in `full`, `layer`, `unit` and
  `diagonal`, with dense solvers and with the inverse that `bfgs` follows; each option of the pair rule; K-BFGS in the space of outputs.
- The pair is that of the batch whatever the loop does to p.grad: clipping, accumulation, a scaled loss; dropout draws the same mask.
- B s = y after the pair; B has a trajectory, so one batch is refused, and `pairs=` gives it one.
- What would make a wrong pair is refused: a loss that no criterion computes, no optimizer, a batch changed in place.
- State resumes bit-exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense_secant as loops
import precond
from precond.damping import Factored
from precond.errors import InvalidCombination, NeedsTrajectory, ObservationError, UsageError
from precond.matrices import BFGSHessian
from precond.representations import KronIO
from precond.solvers import BFGS

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
LR, DAMPING, STEPS = 0.3, 0.1, 5
Batch = tuple[Tensor, Tensor]


def network(seed: int = 0, dropout: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = nn.Dropout(0.4) if dropout else nn.Identity()
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), middle, nn.Linear(4, 2)).double()


def data(n: int = 6, steps: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(2, (n,), generator=generator)) for _ in range(steps)
    ]


BLOCKS: dict[str, list[list[int]]] = {
    "full": [list(range(26))],
    "layer": [list(range(16)), list(range(16, 26))],
    "unit": [[3 * r, 3 * r + 1, 3 * r + 2, 12 + r] for r in range(4)] + [[16 + 4 * r + c for c in range(4)] + [24 + r] for r in range(2)],
    "diagonal": [[i] for i in range(26)],
}


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    path = []
    for x, t in batches:
        optimizer.zero_grad()
        criterion(model(x), t).backward()
        optimizer.step()
        path.append(loops.flat(model))
    return path


def attached(model: nn.Module, **options: Any) -> tuple[precond.Preconditioner, torch.optim.Optimizer, nn.Module]:
    options = {"matrix": "bfgs_hessian", "repr": "full", "solver": "cholesky", "damping": DAMPING, **options}
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=LR), nn.CrossEntropyLoss()
    return precond.Preconditioner(**options).attach(model, criterion, optimizer), optimizer, criterion


RULES: list[dict[str, Any]] = [
    {}, {"powell": 0.0}, {"second": "mix", "amount": 0.9}, {"second": "add", "amount": 0.3}, {"scale_initial": True}, {"skip": 0.98}, {"powell": 0.9},
    {"powell": 0.9, "powell_on": "inverse"},
]  # fmt: skip


@pytest.mark.parametrize("pairs", ["replay", "products", "gradients"])
@pytest.mark.parametrize("repr", BLOCKS)
@pytest.mark.parametrize("solver", ["dense", "bfgs"])
def test_training_follows_the_loops(pairs: Any, repr: str, solver: str) -> None:
    chosen = solver if solver == "bfgs" else "elementwise" if repr == "diagonal" else "cholesky"
    model = network()
    _, optimizer, criterion = attached(model, matrix=BFGSHessian(pairs=pairs), repr=repr, solver=chosen)
    losses = [loops.loss_of(network(), criterion, *b) for b in data()]
    expected = loops.train(
        network(), losses, BLOCKS[repr], pairs=pairs, lr=LR, damping=DAMPING, rule=loops.Rule(), invert=solver == "bfgs" and repr != "diagonal"
    )  # numbers one by one are divided by: there is no inverse to follow
    close(fit(model, optimizer, criterion, data()), expected)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("solver", ["cholesky", "bfgs"])
def test_each_option_of_the_rule_follows_the_loops(rule: dict[str, Any], solver: str) -> None:
    model = network()
    _, optimizer, criterion = attached(model, matrix=BFGSHessian(decay=0.5, **rule), solver=solver)
    losses = [loops.loss_of(network(), criterion, *b) for b in data()]
    options: dict[str, Any] = {"pairs": "replay", "lr": LR, "damping": DAMPING, "invert": solver == "bfgs", "decay": 0.5}
    expected = loops.train(network(), losses, BLOCKS["full"], rule=loops.Rule(**rule), **options)
    close(fit(model, optimizer, criterion, data()), expected)
    if rule not in ({}, {"powell": 0.0}):  # no pair of this path is damped by the default
        assert not torch.equal(expected[-1], loops.train(network(), losses, BLOCKS["full"], rule=loops.Rule(), **options)[-1])


@pytest.mark.parametrize("initial", [None, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_kbfgs_follows_the_loops(initial: float | None, decay: float) -> None:
    model = network()
    _, optimizer, criterion = attached(
        model, matrix=BFGSHessian(decay=decay), repr="kron_io", solver=BFGS(initial=initial), damping=Factored(DAMPING, pi=False), history=0.9
    )
    layers = [m for m in network() if isinstance(m, nn.Linear)]
    weights = [torch.cat([m.weight, m.bias.unsqueeze(1)], 1).detach() for m in layers]
    expected = loops.kbfgs(
        weights, data(), torch.tanh, criterion, lr=LR, damping=DAMPING, beta=0.9, rule=loops.Rule(), decay=decay, initial=initial
    )
    close(fit(model, optimizer, criterion, data()), expected)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_output_factor_of_all_its_pairs_is_the_dense_one(rule: dict[str, Any]) -> None:
    def path(memory: int | None) -> Tensor:
        model = network()
        options = {"matrix": BFGSHessian(decay=0.5, **rule), "repr": KronIO(memory=memory), "damping": Factored(DAMPING, pi=False)}
        _, optimizer, criterion = attached(model, **options)
        return torch.stack(fit(model, optimizer, criterion, data()))

    close(path(STEPS), path(None), rtol=1e-8)  # two ways to the same matrix, each of which divides by s^T y
    assert (path(1) - path(None)).abs().max() > 1e-6


def test_a_memory_is_refused_where_there_are_groups_or_no_number() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()).double()
    preconditioner = precond.Preconditioner(matrix="bfgs_hessian", repr=KronIO(memory=3), solver="bfgs")
    preconditioner.attach(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=LR))
    assert "one output factor a group" in str(preconditioner.describe())
    for memory in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="a number of pairs"):
            KronIO(memory=memory)  # type: ignore[arg-type]


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batch: Batch) -> None:
    criterion(model(batch[0]), batch[1]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batch: Batch) -> None:
    for part in (slice(0, 2), slice(2, 6)):
        x, t = batch[0][part], batch[1][part]
        (criterion(model(x), t) * len(x) / 6).backward()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batch: Batch) -> None:
    (criterion(model(batch[0]), batch[1]) * 64).backward()
    for p in model.parameters():
        p.grad /= 64  # type: ignore[operator]


def retried(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batch: Batch) -> None:
    criterion(model(batch[0] * 3), batch[1]).backward()
    optimizer.zero_grad()  # the step before was thought better of
    criterion(model(batch[0]), batch[1]).backward()


@pytest.mark.parametrize("loop", [clipped, accumulated, scaled, retried])
@pytest.mark.parametrize("repr", ["full", "kron_io"])
def test_pairs_are_those_of_the_batch_whatever_the_loop_does(loop: Any, repr: str) -> None:
    """The matrix after one step of the given size is that of a plain loop which takes the same step."""
    model, batch = network(), data()[0]
    preconditioner, optimizer, criterion = attached(model, repr=repr)
    loop(model, optimizer, criterion, batch)
    optimizer.step()
    reference = _follow_by_hand(network(), nn.CrossEntropyLoss(), batch, loops.flat(model), repr)
    got: Any = preconditioner.operators
    for name, B in reference.items():
        matrix = got[name].factors[0].matrix if repr == "kron_io" else got[name].matrix
        close(matrix, B, rtol=1e-8)


def _follow_by_hand(model: nn.Module, criterion: nn.Module, batch: Batch, after: Tensor, repr: str) -> dict[str, Tensor]:
    """B by block after the one step from the model's parameters to `after`."""
    rule, loss = loops.Rule(), loops.loss_of(model, criterion, *batch)
    before = loops.flat(model)
    if repr == "full":
        s, y = after - before, loops.gradient(loss, after) - loops.gradient(loss, before)
        return {"model": loops.direct(torch.eye(len(s), dtype=s.dtype), s, y, rule, True)[0]}
    found = {}
    ends = [_outputs(model, criterion, batch, theta) for theta in (before, after)]
    for name, (h, g) in ends[0].items():
        s, y = ends[1][name][0] - h, ends[1][name][1] - g
        found[name] = loops.direct(torch.eye(len(s), dtype=s.dtype), s, y, rule, True)[0]
    return found


def _outputs(model: nn.Module, criterion: nn.Module, batch: Batch, theta: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(mean output, gradient of the mean loss summed over examples) of each Linear."""
    seen: dict[str, Tensor] = {}
    handles = [m.register_forward_hook(lambda _m, _a, out, n=n: seen.setdefault(n, out)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    loss = criterion(torch.func.functional_call(model, loops.split(model, theta.requires_grad_()), (batch[0],)), batch[1])
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(loss, list(seen.values()))
    return {n: (h.detach().mean(0), g.sum(0)) for (n, h), g in zip(seen.items(), grads, strict=True)}


def test_dropout_draws_the_same_mask_again() -> None:
    model = network(dropout=True)
    preconditioner, optimizer, criterion = attached(model, matrix=BFGSHessian(powell=0.0))
    x, t = data()[0]
    before = loops.flat(model)
    state = torch.get_rng_state()
    loss = criterion(model(x), t)
    loss.backward()
    optimizer.step()
    after = loops.flat(model)

    def at(theta: Tensor) -> Tensor:
        loss = loops.loss_of(network(dropout=True), nn.CrossEntropyLoss(), x, t)
        torch.set_rng_state(state)
        return loops.gradient(loss, theta)

    s, y = after - before, at(after) - at(before)
    B = preconditioner.operators["model"]
    close(B @ s, y, rtol=1e-8)
    start, again = at(before), loops.loss_of(network(dropout=True), nn.CrossEntropyLoss(), x, t)
    torch.manual_seed(5)
    other = loops.gradient(again, after) - start
    assert (B @ s - other).norm() > 1e-3 * y.norm()  # another mask is another pair


def pairs_of(model: nn.Module, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a quadratic with positive curvature, (P,)."""
    generator = torch.Generator().manual_seed(3)
    P = sum(p.numel() for p in model.parameters())
    root = torch.randn(P, P, dtype=torch.float64, generator=generator)
    steps_ = [torch.randn(P, dtype=torch.float64, generator=generator) for _ in range(steps)]
    return [(s, root @ (root.T @ s) / P + s) for s in steps_]


@pytest.mark.parametrize("repr", BLOCKS)
def test_curvature_follows_given_pairs(repr: str) -> None:
    model = network()
    found = precond.curvature(model, nn.CrossEntropyLoss(), matrix="bfgs_hessian", repr=repr, pairs=pairs_of(model)).to_dense()
    expected = torch.zeros_like(found)
    for block in BLOCKS[repr]:
        B = torch.eye(len(block), dtype=torch.float64)
        for k, (s, y) in enumerate(pairs_of(model)):
            B, _ = loops.direct(B, s[block], y[block], loops.Rule(), k == 0)
        expected[torch.tensor(block).unsqueeze(1), torch.tensor(block)] = B
    close(found, expected)
    s, y = pairs_of(model)[-1]
    if repr == "full":
        close(found @ s, y)
        assert (found @ pairs_of(model)[0][0] - pairs_of(model)[0][1]).norm() > 1e-3  # earlier pairs are not kept


def test_curvature_takes_pairs_by_name_and_in_output_space() -> None:
    model, (x, t) = network(), data()[0]
    s, y = pairs_of(model)[0]
    by_name = [(loops.split(model, s), loops.split(model, y))]
    ask = partial(precond.curvature, model, nn.CrossEntropyLoss(), matrix="bfgs_hessian")
    close(ask(repr="full", pairs=by_name).to_dense(), ask(repr="full", pairs=[(s, y)]).to_dense())
    outputs = {"0": torch.arange(4.0, dtype=torch.float64), "3": torch.ones(2, dtype=torch.float64)}
    C = ask(x, t, repr="kron_io", pairs=[(outputs, {n: 2 * v for n, v in outputs.items()})])
    a = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], 1)
    B, _ = loops.direct(torch.eye(4, dtype=torch.float64), outputs["0"], 2 * outputs["0"], loops.Rule(), True)
    close(C.blocks["0"].to_dense(), torch.kron(B, a.T @ a / 6))
    with pytest.raises(UsageError, match="'0', '3'"):
        ask(x, t, repr="kron_io", pairs=[(s, y)])
    with pytest.raises(UsageError, match=r"misses '0.weight'"):
        ask(repr="full", pairs=[({}, {})])
    with pytest.raises(UsageError, match="is made from inputs and targets"):
        precond.curvature(model, nn.CrossEntropyLoss(), x, t, matrix="ggn", repr="full", pairs=[(s, y)])
    with pytest.raises(UsageError, match="one of the two"):
        ask(repr="kron_io", pairs=[(outputs, outputs)])


def test_one_batch_is_refused() -> None:
    x, t = data()[0]
    with pytest.raises(NeedsTrajectory, match=r"give pairs=\[\(s, y\), \.\.\.\]"):
        precond.curvature(network(), nn.CrossEntropyLoss(), x, t, matrix="bfgs_hessian", repr="full")


def test_a_loss_no_criterion_computes_is_refused() -> None:
    model, (x, t) = network(), data()[0]
    _, optimizer, criterion = attached(model)
    (criterion(model(x), t) + sum(p.square().sum() for p in model.parameters())).backward()
    with pytest.raises(ObservationError, match="is not that of the criterion calls alone"):
        optimizer.step()


def test_pairs_need_the_optimizer() -> None:
    with pytest.raises(UsageError, match="after the optimizer's update"):
        precond.Preconditioner(matrix="bfgs_hessian", repr="full", solver="bfgs").attach(network(), nn.CrossEntropyLoss())
    successive = precond.Preconditioner(matrix=BFGSHessian(pairs="gradients"), repr="full", solver="bfgs")
    successive.attach(network(), nn.CrossEntropyLoss())


def test_a_batch_changed_in_place_is_refused() -> None:
    model, (x, t) = network(), data()[0]
    _, optimizer, criterion = attached(model)
    criterion(model(x), t).backward()
    x.zero_()
    with pytest.raises(ObservationError, match="changed in place"):
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"solver": "bfgs"}, {"matrix": BFGSHessian(pairs="gradients")}, {"repr": "kron_io", "solver": "bfgs"},
        {"repr": KronIO(memory=2), "solver": "bfgs"},
    ],
    ids=str,
)  # fmt: skip
def test_state_resumes_bit_exactly(options: dict[str, Any]) -> None:
    model = network()
    preconditioner, optimizer, criterion = attached(model, **options)
    fit(model, optimizer, criterion, data()[:3])
    other = network()
    other.load_state_dict(model.state_dict())
    resumed, again, its_criterion = attached(other, **options)
    resumed.load_state_dict(preconditioner.state_dict())
    ends = fit(model, optimizer, criterion, data()[3:]), fit(other, again, its_criterion, data()[3:])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_options_without_meaning_are_refused() -> None:
    for options, message in (({"pairs": "luck"}, "pairs="), ({"powell": 1.0}, "powell="), ({"second": "more"}, "second="), ({"skip": -1.0}, "skip=")):
        with pytest.raises(ValueError, match=message):
            BFGSHessian(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="initial="):
        BFGS(initial=0.0)
    with pytest.raises(InvalidCombination, match="gives only pairs of a step"):
        attached(network(), matrix=BFGSHessian(pairs="products"), repr="kron_io")
