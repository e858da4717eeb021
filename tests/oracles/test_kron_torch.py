"""PSGD Kron beside `kron_torch` 0.3.3, its most used release.

- With that package's options the recipe makes the same steps: triangular or diagonal factors, the momentum whitened and then preconditioned, an
  RMS clip of 1.1. Both see the same noise v.
- With another bound of the norm, or the gradient whitened in place of the momentum, it does not.

Two things of the package are replaced, neither of which is the method: noise of sqrt(eps of float32) times the mean of |g|, which it adds to g in
place, so that the momentum that it preconditions has it too; and a triangular solve in float32.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import precond
from precond.matrices import BatchedEmpiricalFisher
from precond.representations import KronDim
from precond.solvers import PSGD
from precond.transforms import Momentum, RMSClip
from references.common import NETWORKS, theta

STEPS, LR = 8, 0.05
FORMS = {"triangular": ({"modes": "all"}, None), "diagonal": ({"max_dim": 0, "oversized": "diagonal"}, "all_diag")}


def ours(monkeypatch: pytest.MonkeyPatch, form: str, *, of: Any = "momentum", bound: Any = "column") -> tuple[Tensor, list[Tensor]]:
    """theta after every step, and the noise v by step and parameter."""
    network = NETWORKS["mlp"]
    model, path, seen = network.make(), [], []
    module = importlib.import_module("precond.observe.probes")  # the package has a function of that name
    original = module._draw

    def noted(*arguments: Any) -> Any:
        drawn = original(*arguments)
        seen.extend(v[0] for v in drawn.values())
        return drawn

    monkeypatch.setattr(module, "_draw", noted)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    made = precond.recipe(
        "psgd_kron", matrix=BatchedEmpiricalFisher(of=of), repr=KronDim(**FORMS[form][0]), damping=0.0, seed=0,
        solver=PSGD(update="EQ", bound=bound, decay=0.0, initial=1.0, step=0.1), transforms=[Momentum(0.9), RMSClip(1.1)],
    )  # fmt: skip
    with made.attach(model, network.criterion, optimizer):
        for inputs, targets in network.batches(STEPS):
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            optimizer.step()
            path.append(theta(model))
    monkeypatch.undo()
    return torch.stack(path), seen


def theirs(monkeypatch: pytest.MonkeyPatch, form: str, noise: list[Tensor]) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        kron = importlib.import_module("kron_torch.kron")
        network = NETWORKS["mlp"]
        model, path, left = network.make(), [], iter(noise)
        optimizer = kron.Kron(
            model.parameters(), lr=LR, b1=0.9, preconditioner_update_probability=1.0, min_ndim_triangular=1, memory_save_mode=FORMS[form][1],
            precond_dtype=torch.float64,
        )  # fmt: skip
        monkeypatch.setattr(torch, "randn_like", lambda like: next(left).reshape(like.shape))
        monkeypatch.setattr(torch, "finfo", lambda dtype: SimpleNamespace(eps=0.0, tiny=1e-300))
        monkeypatch.setattr(kron, "_solve_triangular_right", _right)
        for inputs, targets in network.batches(STEPS):
            optimizer.zero_grad()
            network.criterion(model(inputs), targets).backward()
            optimizer.step()
            path.append(theta(model))
        monkeypatch.undo()
    assert next(left, None) is None
    return torch.stack(path)


def _right(X: Tensor, Q: Tensor) -> Tensor:
    """X Q^-1, in the dtype given."""
    return torch.linalg.solve_triangular(Q, X.reshape(-1, X.shape[-1]), upper=True, left=False).reshape(X.shape)


@pytest.mark.parametrize("form", FORMS)
def test_the_recipe_makes_the_steps_of_kron_torch(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    path, noise = ours(monkeypatch, form)
    torch.testing.assert_close(path, theirs(monkeypatch, form, noise), rtol=1e-10, atol=1e-10)


def test_another_option_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    path, noise = ours(monkeypatch, "triangular")
    for options in ({"bound": "diagonal"}, {"of": "gradient"}):
        other, same = ours(monkeypatch, "triangular", **options)
        assert all(torch.equal(a, b) for a, b in zip(noise, same, strict=True))
        assert (other - path).abs().max() > 1e-4
