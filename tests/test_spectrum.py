"""Claims about `precond.spectrum` and about the logging channel "precond":

- eigenvalues are those of the dense matrix, for every structure that knows them, counted with their multiplicity; by quadrature, of matrix-free
  operators, nodes lie within the spectrum, counts sum to n, and with n steps and probes that see everything the spectrum is exact;
- blocks of a preconditioner are read by name, damped or not; what there is not is refused; a plot is written, and a missing package is one sentence;
- one line a block and reason in 100 steps, at the right level; none where nothing happens.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import precond
from nets import normal
from precond import UsageError, inverse, spectrum
from precond.compare.extras import MissingPackage
from precond.operators import BlockDiagonal, Dense, Diagonal, Kronecker, KroneckerSum, LowRank, MatrixFree, Operator
from training import EXACT, batches, fit, make, net, plain, sgd

A = normal(4, 4, seed=1)
A = A + A.T
B = normal(3, 3, seed=2) @ normal(3, 3, seed=2).T
OPERATORS: dict[str, Operator] = {
    "dense": Dense(A),
    "diagonal": Diagonal(A.diagonal()),
    "stack": Dense(torch.stack([A, 2 * A])),
    "kronecker": Kronecker(B, A, scale=0.3),
    "sum": KroneckerSum(Kronecker(B, A), Kronecker(B, B @ B, scale=0.1) if len(A) == 3 else Kronecker(B, A @ A)),
    "low_rank": LowRank(normal(2, 5, seed=3)),
    "blocks": BlockDiagonal({"a": Dense(A), "b": LowRank(normal(2, 5, seed=3))}, {"a": torch.arange(4), "b": torch.arange(5, 10)}, n=11),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_that_of_the_dense_matrix(name: str) -> None:
    C = OPERATORS[name]
    S = spectrum(C)
    assert S.exact and float(S.counts.sum()) == C.n
    expected = torch.linalg.eigvalsh(C.to_dense())
    assert_close(S.values.repeat_interleave(S.counts.long()), expected, rtol=1e-10, atol=1e-11)
    assert_close(S.trace(), C.trace(), **EXACT)
    assert S.negative == int((expected < -1e-11).sum())


def test_condition_numbers() -> None:
    assert spectrum(Diagonal(torch.tensor([-4.0, 1.0, 2.0]))).condition == 4.0
    assert spectrum(LowRank(normal(2, 5))).condition == float("inf")
    C = Dense(B)
    assert spectrum(inverse(C, solver="eigen", damping=0.1).damped).condition == pytest.approx(
        float(torch.linalg.cond(B + 0.1 * torch.eye(3).double()))
    )


def test_quadrature() -> None:
    C = MatrixFree(lambda v: A @ v, 4, torch.float64, "cpu")
    true = torch.linalg.eigvalsh(A)
    S = spectrum(C, probes=6, steps=4)
    assert not S.exact and float(S.counts.sum()) == pytest.approx(4)
    assert_close(S.values.unique().round(decimals=8).unique(), true.round(decimals=8), **EXACT)
    assert S.condition == pytest.approx(float(true.abs().max() / true.abs().min()))
    short = spectrum(C, probes=3, steps=2)
    assert float(short.values[0]) > float(true[0]) and float(short.values[-1]) < float(true[-1])  # negative: two steps see less
    signs = spectrum(MatrixFree(lambda v: torch.arange(1.0, 6).double() * v, 5, torch.float64, "cpu"), probes=1, steps=5)
    assert_close(signs.trace(), torch.tensor(15.0, dtype=torch.float64), **EXACT)  # random signs see a diagonal exactly
    assert torch.equal(S.values, spectrum(C, probes=6, steps=4).values)


def test_a_block_of_a_preconditioner() -> None:
    preconditioner = make(repr="kron_io", damping=0.1)
    fit(preconditioner, steps=2)
    C = preconditioner.operators["0"]
    assert_close(spectrum(preconditioner, "0").values, torch.linalg.eigvalsh(C.to_dense()), rtol=1e-9, atol=1e-10)
    damped = precond.damping.Factored(0.1)(C).to_dense()
    assert_close(spectrum(preconditioner, "0", damped=True).values, torch.linalg.eigvalsh(damped), rtol=1e-9, atol=1e-10)
    with pytest.raises(UsageError, match=r"no block None: the blocks are '0', '2'"):
        spectrum(preconditioner)
    whole = make()
    fit(whole, steps=1)
    assert len(spectrum(whole).values) == 43


def test_what_there_is_not() -> None:
    with pytest.raises(UsageError, match=r"made by attach\(\)"):
        spectrum(make(), "0")
    live = make(repr="matrix_free", solver="cg")
    fit(live, steps=1)
    with pytest.raises(UsageError, match="lives within a step"):
        spectrum(live)
    with pytest.raises(UsageError, match="takes no block"):
        spectrum(Dense(A), "0")
    with pytest.raises(ValueError, match="at least one probe"):
        spectrum(Dense(A), probes=0)


def test_a_plot_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    S = spectrum(Dense(A))
    path = S.plot(tmp_path / "spectrum.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"^matplotlib is needed to draw a spectrum: pip install"):
        S.plot(tmp_path / "other.png")


# -- the logging channel ---------------------------------------------------------------------------------------------


def test_a_climbed_rung_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="precond")
    preconditioner = make(damping=0.0)  # singular: every refresh climbs
    fit(preconditioner, steps=3)
    assert preconditioner.diagnostics["retries_damping"] == 3
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("precond", logging.INFO)
    assert record.getMessage().startswith("step 0: block 'model' was refreshed with more damping than asked for")


def test_what_is_dropped_is_told_by_block_and_again_after_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precond.events.EVERY", 3)
    preconditioner, model, criterion = make(repr="layer", history=0.5), net(), nn.CrossEntropyLoss()
    preconditioner.attach(model, criterion, optimizer := sgd(model))
    for k, (x, y) in enumerate(batches(7)):
        plain(model, criterion, optimizer, x * torch.nan if k else x, y)
    told = sorted(
        (r.getMessage().split(" (")[1].split(";")[0], r.getMessage().split("'")[1], r.getMessage().split(":")[0]) for r in caplog.records
    )
    expected = [(reason, block, f"step {k}") for reason in ("directions_zeroed", "observations_dropped") for block in "02" for k in (1, 4)]
    assert told == expected and {r.levelno for r in caplog.records} == {logging.WARNING}


def test_nothing_is_told_of_a_good_run_or_by_another_rank(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="precond")
    fit(make())
    quiet = make(damping=0.0)
    model, criterion = net(), nn.CrossEntropyLoss()
    quiet.attach(model, criterion, optimizer := sgd(model))
    quiet.diagnostics.events.quiet = True
    plain(model, criterion, optimizer, *batches(1)[0])
    assert not caplog.records
