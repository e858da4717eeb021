"""The code that runs on every rank, and in one process as what it must equal. Imported afresh by every spawned worker.

* `CASES` are training runs, `CONTROLS` wrong ones; `single(case)` is the run of one process on the whole batch, `worker` all runs of one rank;
* a worker writes what it is doing to `rank<r>.doing` and its parameters to `rank<r>.pt`; what it raises goes to its parent;
* sampled labels are keyed by rank, so that K-FAC's are replaced, in both runs, by a fixed function of the row and its target.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nets
import precond
from precond import search
from precond.likelihoods.categorical import Categorical
from precond.matrices import BatchedEmpiricalFisher

STEPS, EXAMPLES, CLASSES = 5, 8, 3
NAN_STEP = 2
EQUAL, UNEQUAL = (4, 8), (5, 8)  # where a rank's share of the batch ends
TIGHT = {"solver": precond.solvers.CG(tolerance=1e-13, warm_start=0.95)}


@dataclass(frozen=True)
class Case:
    """One training run.

    ends: of the ranks' shares. micro: backward passes a step, the first ones under `no_sync`. nan: the last rank's data is NaN in step
    `NAN_STEP`. conv: the network has convolutions. weighted: each rank's loss has the weight n_r * world / N. ddp: arguments of
    DistributedDataParallel. lr: of SGD. closure: the loop is `optimizer.step(closure)`. alone: each rank decides about an update by its own loss.
    """

    make: Callable[[], precond.Preconditioner]
    ends: tuple[int, ...] = EQUAL
    micro: int = 1
    nan: bool = False
    conv: bool = False
    weighted: bool = True
    ddp: tuple[tuple[str, bool], ...] = ()
    lr: float = 0.1
    closure: bool = False
    alone: bool = False


def _recipe(name: str, **arguments: Any) -> Callable[[], precond.Preconditioner]:
    return lambda: precond.recipe(name, **{"solver_interval": 2, "seed": 5, **arguments})


def _cell(matrix: Any, representation: Any, solver: Any, damping: Any = 0.1, **options: Any) -> Callable[[], precond.Preconditioner]:
    return lambda: precond.Preconditioner(matrix=matrix, repr=representation, solver=solver, damping=damping, seed=5, **options)


METHODS = {
    "kfac": _recipe("kfac"),
    "kfac_exact": _recipe("kfac", matrix="ggn"),
    "shampoo": _recipe("shampoo", history=precond.history.Sum(1e-2)),
    "hessian_free": lambda: precond.recipe("hessian_free", seed=5, **TIGHT),
    "empirical_layer": _cell("empirical_fisher", "layer", "cholesky", history=0.9),
    "hessian_full": _cell("hessian", "full", "lu", damping=3.0),
}
CASES: dict[str, Case] = {f"{name}-equal": Case(make) for name, make in METHODS.items()}
CASES |= {f"{name}-unequal": Case(make, ends=UNEQUAL) for name, make in METHODS.items()}
CASES |= {f"{name}-no_sync": Case(METHODS[name], micro=2) for name in ("kfac", "shampoo", "hessian_free", "empirical_layer")}
CASES |= {f"{name}-nan": Case(make, nan=True) for name, make in METHODS.items()}
CASES |= {f"{name}-conv": Case(METHODS[name], ends=UNEQUAL, conv=True) for name in ("kfac", "shampoo", "hessian_free")}
for _name, _curvature in (("levenberg", "block"), ("levenberg_exact", "ggn")):
    CASES[f"{_name}-unequal"] = Case(
        _cell("ggn", "layer", "cholesky", precond.damping.LevenbergMarquardt(0.01, curvature=_curvature)), ends=UNEQUAL
    )
CASES["levenberg-products"] = Case(_cell("ggn", "matrix_free", TIGHT["solver"], precond.damping.LevenbergMarquardt(0.01)), ends=UNEQUAL)
CASES["ekfac-unequal"] = Case(_recipe("ekfac", solver_interval=1, history=0.9), ends=UNEQUAL)
CASES["recursive-unequal"] = Case(_cell("ggn_recursive", "kron_io", "cholesky", history=0.9), ends=UNEQUAL)
CASES["recursive-nan"] = Case(_cell("ggn_recursive", "kron_io", "cholesky", history=0.9), nan=True)
CASES["bfgs-unequal"] = Case(_cell("bfgs_hessian", "full", "bfgs"), ends=UNEQUAL)
CASES["bfgs-no_sync"] = Case(_cell("bfgs_hessian", "full", "bfgs"), micro=2)
CASES["kbfgs-unequal"] = Case(_cell("bfgs_hessian", "kron_io", "bfgs", history=0.9), ends=UNEQUAL)
CASES["kbfgs_l-unequal"] = Case(_recipe("kbfgs_l", solver_interval=1), ends=UNEQUAL)
CASES["batched_terms-unequal"] = Case(_cell(BatchedEmpiricalFisher(scale="terms"), "layer", "cholesky", history=0.9), ends=UNEQUAL)
CASES["rows-unequal"] = Case(_cell("ggn", "full_low_rank", "smw", history=precond.history.Window(2)), ends=UNEQUAL)
CASES["rows-nan"] = Case(_cell("empirical_fisher", "layer_gram", "smw"), nan=True)
CASES["rows-given"] = Case(_cell("gradient_covariance", "unit_gram", "smw", loss_weights="given"), ends=UNEQUAL)
CASES["sparse-unequal"] = Case(_cell("ggn", "layer_sparse", "sparse_cholesky", history=0.9), ends=UNEQUAL)
CASES["sparse-nan"] = Case(_cell("empirical_fisher", "full_sparse", "sparse_cholesky", history=0.9), nan=True)
CASES["masked-given"] = Case(
    _cell("ggn", precond.representations.LayerSparse(form="masked", pattern="unit"), TIGHT["solver"], loss_weights="given"), ends=UNEQUAL
)
CASES["pruned-unequal"] = Case(_cell("ggn", "diagonal_sparse", "elementwise", history=0.9), ends=UNEQUAL)
CASES["sketch-unequal"] = Case(_cell("ggn", precond.representations.FullLowRank(rank=6, method="sketch"), "smw", history=0.9), ends=UNEQUAL)
CASES["seng-unequal"] = Case(_cell("empirical_fisher", precond.representations.LayerGram(sketch=2, positions=2), "smw"), ends=UNEQUAL, conv=True)
CASES["lanczos-unequal"] = Case(_cell("hessian", precond.representations.FullLowRank(rank=6, products=20), "smw", 3.0), ends=UNEQUAL)
CASES["lanczos-given"] = Case(
    _cell("hessian", precond.representations.LayerLowRank(rank=4, products=15), "smw", 3.0, history=0.9, loss_weights="given"), ends=UNEQUAL
)
CASES["lanczos-nan"] = Case(_cell("hessian", precond.representations.FullLowRank(rank=6, products=20), "smw", 3.0), nan=True)
CASES["kfac-given"] = Case(_recipe("kfac", loss_weights="given"), ends=UNEQUAL)
CASES["hessian_free-given"] = Case(lambda: precond.recipe("hessian_free", loss_weights="given", **TIGHT), ends=UNEQUAL)
CASES["kfac-buckets"] = Case(METHODS["kfac"], ddp=(("gradient_as_bucket_view", True), ("find_unused_parameters", True)))
CASES["martens-unequal"] = Case(
    _cell("ggn", precond.representations.MatrixFree(diagonal="empirical_fisher"), precond.solvers.CG(max_iterations=4, preconditioner="jacobi")),
    ends=UNEQUAL,
)
CASES["bfgs_products-unequal"] = Case(_cell("ggn", "matrix_free", "bfgs", 1.0), ends=UNEQUAL)
CASES["psgd_products-unequal"] = Case(_cell("ggn", "full_gram", "psgd", 1.0), ends=UNEQUAL)
for _name, _search, _lr in (("reject", precond.transforms.Reject(), 0.8), ("backtrack", precond.transforms.Backtrack(reductions=8), 6.0)):
    CASES[f"{_name}-unequal"] = Case(_cell("ggn", "layer", "cholesky", transforms=[_search]), ends=UNEQUAL, lr=_lr, closure=True)
ALONE = {"reject-alone": replace(CASES["reject-unequal"], alone=True)}
"""A control: the ranks part."""
CONTROLS = {f"{name}-unweighted": Case(METHODS[name], ends=UNEQUAL, weighted=False) for name in ("kfac_exact", "shampoo")}


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, CLASSES))


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, CLASSES))


def _batch(case: Case, step: int) -> tuple[Tensor, Tensor]:
    inputs = nets.normal(EXAMPLES, 4, seed=20 + step)
    return inputs.reshape(EXAMPLES, 1, 2, 2) if case.conv else inputs, nets.labels(CLASSES, EXAMPLES, seed=70 + step)


def fix_labels() -> None:
    """The label that is 'drawn' for a row: a function of its target and of its smallest logit."""

    def sample(self: Categorical, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        labels = (target + output.detach().argmin(1)) % CLASSES
        return output.detach().softmax(1) - F.one_hot(labels, CLASSES)

    Categorical.sample = sample  # type: ignore[method-assign]


def _train(case: Case, wrap: Callable[[nn.Module], nn.Module], rank: int | None) -> Tensor:
    """(STEPS, P): the parameters after every step; `rank` None is one process on the whole batch."""
    plain, criterion = nets.seeded(_conv if case.conv else _mlp), nn.CrossEntropyLoss()
    model = wrap(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=0.0 if case.nan else 0.9)
    path = []
    with case.make().attach(model, criterion, optimizer):
        for step in range(STEPS):
            inputs, targets = _batch(case, step)
            bad = case.nan and step == NAN_STEP
            if rank is None:
                start, end, weight = 0, case.ends[0] if bad else EXAMPLES, 1.0
            else:
                start, end = (0, *case.ends)[rank : rank + 2]
                weight = (end - start) * len(case.ends) / EXAMPLES if case.weighted else 1.0
                inputs = inputs * float("nan") if bad and rank == len(case.ends) - 1 else inputs
            def evaluate() -> Tensor:
                optimizer.zero_grad()
                return _accumulate(model, criterion, inputs[start:end], targets[start:end], case.micro if rank is not None else 1, weight)  # noqa: B023  # called in this step

            if case.closure:
                optimizer.step(evaluate)
                path.append(torch.cat([p.detach().flatten() for p in plain.parameters()]))
                continue
            evaluate()
            if bad and rank is None:  # the others' gradient is NaN after the reduction: the step is not made
                for p in plain.parameters():
                    assert p.grad is not None
                    p.grad.fill_(float("nan"))
            optimizer.step()
            path.append(torch.cat([p.detach().flatten() for p in plain.parameters()]))
    return torch.stack(path)


def _accumulate(model: nn.Module, criterion: nn.Module, inputs: Tensor, targets: Tensor, micro: int, weight: float) -> Tensor:
    """One step's backward passes; only the last one reduces the gradients. The loss of the last one."""
    pieces = list(zip(inputs.chunk(micro), targets.chunk(micro), strict=True))
    for x, y in pieces[:-1]:
        with model.no_sync():
            (criterion(model(x), y) * weight / micro).backward()
    x, y = pieces[-1]
    loss = criterion(model(x), y) * weight / micro
    loss.backward()
    return loss.detach()


def single(case: Case) -> Tensor:
    """The run of one process on the whole batch."""
    return _train(case, lambda model: model, None)


def worker(rank: int, world: int, folder: str, misbehave: str) -> None:
    """Every case on one rank. misbehave: "hang" or "raise" on the last rank, for the test of the harness itself."""
    torch.set_num_threads(1)
    doing = Path(folder, f"rank{rank}.doing")
    doing.write_text("joining the group")
    store = dist.FileStore(str(Path(folder, "store")), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    if misbehave:
        doing.write_text(f"the case {misbehave!r}")
        if misbehave == "raise" and rank == world - 1:
            raise ArithmeticError("raised on purpose")
        if rank == 0 or misbehave == "raise":
            dist.all_reduce(torch.zeros(1))  # waits for the last rank, which does not come
        time.sleep(600)
    fix_labels()
    paths = {}
    mean = search._mean
    for name, case in (CASES | CONTROLS | ALONE).items():
        doing.write_text(f"the case {name!r}")
        search._mean = (lambda loss, group: float(loss)) if case.alone else mean
        paths[name] = _train(case, lambda model, case=case: DistributedDataParallel(model, **dict(case.ddp)), rank)
    torch.save(paths, Path(folder, f"rank{rank}.pt"))
    doing.write_text("leaving")
    dist.destroy_process_group()
