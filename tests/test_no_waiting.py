"""Claims about steps without a refresh: the host never waits for the device.

- In a valid cell of every solver and of every representation (in all of them in the slow version) a step without observation and refresh runs
  under a mode that refuses every read of a tensor; with each transform too. The mode itself is tested: it refuses what it says.
- Exceptions, by name: `cg`, `krylov` and `neumann`, which have stopping rules or a guard; representations that live one step, which are
  refreshed at each; `on_nonfinite="skip"` and "raise", which read one flag; line searches. The exceptions do wait, or they would not be exceptions.
- With a GPU, the same under `torch.cuda.set_sync_debug_mode("error")`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond import Preconditioner, representations, solvers, transforms
from precond.solvers import CG, Krylov, Neumann
from training import batches, make, net, sgd
from waiting import Waits, as_on_a_device, ban

STOPPING = ("cg", "krylov", "neumann")
LIVE = tuple(r for r in representations.names() if representations.get(r)().live)
VALID = [c for c in precond.combinations() if c.valid and c.solver not in STOPPING and c.repr not in LIVE]
RARELY = 3  # steps between two refreshes


def first(cells: list[precond.Cell], key: Callable[[precond.Cell], Any]) -> list[precond.Cell]:
    return list({key(c): c for c in reversed(cells)}.values())


EVERYDAY = [*first(VALID, lambda c: c.solver), *first(VALID, lambda c: c.repr)]
"""Each solver and each representation at least once; all cells in the slow version."""


def quiet_steps(preconditioner: Preconditioner, banned: Callable[[], AbstractContextManager[None]], device: str = "cpu") -> int:
    """Trains, and forbids waiting in the optimizer's step where nothing is due; the number of such steps."""
    model, criterion = net().float().to(device), nn.CrossEntropyLoss()
    optimizer = sgd(model, lr=1e-3)
    preconditioner.attach(model, criterion, optimizer)
    found = 0
    for step, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        criterion(model(x.float().to(device)), y.to(device)).backward()
        if step in (0, RARELY):
            optimizer.step()
        else:
            with banned():
                optimizer.step()
            found += 1
    preconditioner.remove()
    return found


def built(cell: precond.Cell, **options: Any) -> Preconditioner:
    options = {"damping": 1.0, "curvature_interval": RARELY, "solver_interval": RARELY, **options}
    return make(cell.matrix, cell.repr, cell.solver, options.pop("damping"), **options)


ids: Any = {"ids": lambda c: f"{c.matrix}-{c.repr}-{c.solver}"}


@pytest.mark.parametrize("cell", EVERYDAY, **ids)
def test_a_step_without_a_refresh_never_waits(cell: precond.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    assert quiet_steps(built(cell), ban) == 3


@pytest.mark.slow
@pytest.mark.parametrize("cell", VALID, **ids)
def test_no_step_of_any_cell_waits(cell: precond.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    assert quiet_steps(built(cell), ban) == 3


def test_every_solver_is_walked() -> None:
    assert {c.solver for c in EVERYDAY} | set(STOPPING) == set(solvers.names())
    assert {c.repr for c in EVERYDAY} | set(LIVE) == set(representations.names())


TRANSFORMS: dict[str, Any] = {
    **{f"graft_{k}": transforms.Graft(k) for k in ("sgd", "adagrad", "rmsprop", "adam")},
    "kl_clip": transforms.KLClip(1e-3), "norm": transforms.NormClip(1.0), "element": transforms.ElementClip(0.1), "rms": transforms.RMSClip(1.0),
    "momentum": transforms.Momentum(0.9), "shape": transforms.ShapeScale(), "rescale": transforms.Rescale(0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("repr", ["kron_dim"])
def test_no_transform_waits(name: str, repr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    cell = next(c for c in VALID if (c.repr, c.solver) == (repr, "cholesky"))
    assert quiet_steps(built(cell, transforms=[TRANSFORMS[name]], history=0.9), ban) == 3


def test_every_transform_is_walked() -> None:
    named = {type(t).__name__ for t in TRANSFORMS.values()}
    every = {n for n in transforms.__all__ if isinstance(getattr(transforms, n), type) and issubclass(getattr(transforms, n), transforms.Transform)}
    assert every - named == {"Transform", "Reject", "Backtrack"}  # a line search reads the loss


@pytest.mark.parametrize("solver", [CG(), Krylov(), Neumann()], ids=STOPPING)
def test_stopping_rules_do_wait(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    with pytest.raises(Waits):
        quiet_steps(make("ggn", "layer", solver, 1.0, curvature_interval=RARELY), ban)


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_to_skip_or_raise_one_flag_is_read(on_nonfinite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    with pytest.raises(Waits, match=r"bool|_local_scalar_dense"):
        quiet_steps(make("ggn", "layer", "cholesky", 1.0, curvature_interval=RARELY, on_nonfinite=on_nonfinite), ban)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t[0].item(), "bool": lambda t: bool(t[0]), "float": lambda t: float(t[0]), "int": lambda t: int(t[0]), "list": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(), "numpy": lambda t: t.numpy(), "branch": lambda t: 1 if t[0] > 0 else 0, "mask": lambda t: t[t > 0],
    "nonzero": lambda t: t.nonzero(), "where": lambda t: torch.where(t > 0), "unique": lambda t: t.unique(), "equal": lambda t: torch.equal(t, t),
    "put": lambda t: t.__setitem__(t > 0, torch.ones(2)), "contains": lambda t: 1.0 in t, "index": lambda t: [1, 2][t.long()[0]],
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_the_mode_refuses_every_read(name: str) -> None:
    t = torch.tensor([1.0, 0.0, 1.0])
    with ban(), pytest.raises(Waits):
        READS[name](t)
    READS[name](t)
    with ban():
        torch.where(t > 0, t @ t.diag(), 0.0)  # and nothing else


@pytest.mark.gpu
@pytest.mark.parametrize("cell", VALID, **ids)
def test_on_a_gpu_no_step_without_a_refresh_waits(cell: precond.Cell) -> None:
    assert quiet_steps(built(cell), _debug, "cuda") == 3


class _Debug:
    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


def _debug() -> AbstractContextManager[None]:
    return _Debug()  # type: ignore[return-value]
