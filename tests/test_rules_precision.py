"""Rule 12 claims, of a float32 model whose whole loop, backward and step included, runs under bf16 autocast:

- the statistics are float32, and equal the float32 products of what the layers saw, for inputs and for output gradients;
- formed in the user's context they would differ; the switches of the user's context are as they were afterwards;
- a bf16 model and fp16 gradients with AMP's scale keep float32 statistics, and p.grad keeps its own dtype.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import precond
from nets import labels, normal
from precond import numerics
from training import gradients, make, plain, sgd


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 10))


X, Y = normal(64, 24).float(), labels(10, 64)


def run(matrix: str = "empirical_fisher", repr: str = "kron_io", *, autocast: bool = True, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """One step; returns the preconditioner and the (a, g) of each layer as hooks of our own saw them."""
    model, criterion, seen = wide(), nn.CrossEntropyLoss(), {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name + ".a"] = args[0].detach()
            output.register_hook(lambda g: seen.__setitem__(name + ".g", g.detach()))

        return hook

    handles = [model[i].register_forward_hook(look(str(i))) for i in (0, 2)]
    preconditioner, optimizer = make(matrix, repr, "eigen" if repr == "kron_io" else "cholesky", 1e-2, history=0.9, **options), sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain(model, criterion, optimizer, X, Y)
        assert torch.is_autocast_enabled("cpu") is autocast
    for handle in handles:
        handle.remove()
    return preconditioner, seen


def factors(seen: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """(B, A) in float32: A the mean of a a^T with the homogeneous 1, B = N sum g g^T with g of the mean loss."""
    a, g = seen[name + ".a"].float(), seen[name + ".g"].float()
    a = torch.cat([a, torch.ones(len(a), 1)], 1)
    return len(g) * g.T @ g, a.T @ a / len(a)


@pytest.mark.parametrize("name", ["0", "2"])
def test_factors_are_float32_products_under_autocast(name: str) -> None:
    preconditioner, seen = run()
    assert seen["2.g"].dtype == torch.bfloat16 == seen["2.a"].dtype or seen["2.a"].dtype == torch.float32
    for ours, expected in zip(preconditioner.operators[name].factors, factors(seen, name), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.to_dense(), expected, rtol=1e-5, atol=1e-7)


def test_products_in_the_users_context_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "full_precision", lambda device: contextlib.nullcontext())
    with pytest.raises(precond.InvalidCombination, match=r"Kronecker operator .* is in torch\.bfloat16"):
        run()


@pytest.mark.parametrize("cell", [("ggn", "kron_io", "eigen"), ("ggn", "kron_io", "cholesky"), ("empirical_fisher", "layer", "cholesky")], ids="-".join)
def test_the_solve_is_made_in_float32_under_autocast(cell: tuple[str, str, str]) -> None:
    model, criterion = wide(), nn.CrossEntropyLoss()
    preconditioner, optimizer = make(*cell, precond.damping.Tikhonov(0.1) if cell[2] == "eigen" else 0.1), sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        criterion(model(X), Y).backward()
        raw = [p.grad.clone() for p in model[0].parameters()]
        optimizer.step()
    block = next(b for b in preconditioner._session.blocks if b.plan.block.name == "0")
    damped, (w, b) = block.plan.damping(block.operator()).to_dense().double(), (g.double() for g in raw)
    kron = cell[1] == "kron_io"
    vector = torch.cat([w, b[:, None]], 1).flatten() if kron else torch.cat([w.flatten(), b])
    expected = torch.linalg.solve(damped, vector)
    got = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).flatten() if kron else gradients(model[0])
    assert_close(got.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


MATRICES = ["ggn", "fisher", "fisher_mc", "empirical_fisher", "batched_empirical_fisher", "hessian"]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("repr", ["layer", "diagonal"])
def test_statistics_and_gradients_stay_float32_under_autocast(matrix: str, repr: str) -> None:
    model, criterion = wide(), nn.CrossEntropyLoss()
    solver = "lu" if repr == "layer" else "elementwise"
    preconditioner, optimizer = make(matrix, repr, solver, 1.0), sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(model, criterion, optimizer, X, Y)
    kept = [t for b in preconditioner.state_dict()["blocks"].values() for n, t in b["statistics"].items() if t.dim()]
    assert kept and all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in kept)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "batched_empirical_fisher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_keeps_float32_statistics(matrix: str, dtype: torch.dtype) -> None:
    model, criterion = wide().to(dtype), nn.CrossEntropyLoss()
    preconditioner, optimizer = make(matrix, "diagonal", "elementwise", 1.0), sgd(model)
    preconditioner.attach(model, criterion, optimizer)
    (criterion(model(X.to(dtype)), Y) * 1024).backward()
    optimizer.step()
    kept = [t for b in preconditioner.state_dict()["blocks"].values() for n, t in b["statistics"].items() if t.dim()]
    assert kept and all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in kept)
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_scaled_half_precision_gradient_is_divided_in_float32() -> None:
    """Per-term gradients of 1e-7 are below half precision's smallest number, and only AMP's scale keeps them."""

    def observed(dtype: torch.dtype, scale: float) -> Tensor:
        model, criterion = wide().to(dtype), nn.CrossEntropyLoss(reduction="sum")
        preconditioner = make("empirical_fisher", "kron_io", "eigen", 1.0).attach(model, criterion)
        (criterion(1e-7 * model(X.to(dtype)).float(), Y) * scale).backward()
        return preconditioner, scale

    preconditioner, _ = observed(torch.float16, 2.0**16)
    (B, _), (exact, _) = (_factors(p) for p in (preconditioner, observed(torch.float32, 1.0)[0]))
    assert_close(B, exact, rtol=2e-2, atol=0.02 * float(exact.abs().max()))
    assert float(B.diagonal().min()) > 0


def _factors(preconditioner: Any) -> tuple[Tensor, Tensor]:
    preconditioner.step()
    B, A = preconditioner.operators["2"].factors
    return B.to_dense(), A.to_dense()
