"""Claims about numerics:

- eigh symmetrises, works on stacks, and tries float64 when float32 fails or is not finite;
- matrix_power is right, and takes what is within rounding of zero as zero;
- full_precision undoes autocast and TF32, and puts them back even after an error;
- the ladder: each rung is reached when those before it fail, counted by name, and gives a state in the operator's dtype; what is not a
  failure of linear algebra passes through; an operator that is not finite never reaches the solver.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond import numerics
from precond.damping import Damping, Tikhonov
from precond.errors import SolverFailure
from precond.numerics import all_finite, climb, eigh, full_precision, matrix_power, statistics_dtype, symmetrise
from precond.operators import Dense, Diagonal, MatrixFree, Operator
from precond.solvers import Cholesky


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_eigh_is_that_of_the_symmetric_part_of_a_stack() -> None:
    A = draw(2, 3, 4, 4)
    d, U = eigh(A)
    assert_close(U @ torch.diag_embed(d) @ U.mT, (A + A.mT) / 2, rtol=1e-10, atol=1e-10)
    assert_close(symmetrise(A), (A + A.mT) / 2)


def test_eigh_tries_float64_when_float32_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    true, seen = torch.linalg.eigh, []

    def failing(A: Tensor) -> Any:
        seen.append(A.dtype)
        if A.dtype == torch.float32:
            raise numerics.LinAlgError("injected")
        return true(A)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    d, _ = eigh(torch.diag(torch.tensor([1.0, 2.0])))
    assert seen == [torch.float32, torch.float64] and d.dtype == torch.float32
    assert_close(d, torch.tensor([1.0, 2.0]))


def test_eigh_tries_float64_when_float32_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: true(A) if A.dtype == torch.float64 else (A[0] * torch.nan, A))
    assert_close(eigh(torch.diag(torch.tensor([1.0, 2.0])))[0], torch.tensor([1.0, 2.0]))


def test_eigh_of_what_is_not_finite_fails_with_a_sentence() -> None:
    with pytest.raises(SolverFailure, match="entries are finite"):
        eigh(torch.full((2, 2), torch.nan))


def test_half_precision_is_computed_in_float32() -> None:
    assert statistics_dtype(torch.float16) == statistics_dtype(torch.bfloat16) == statistics_dtype(torch.float32) == torch.float32
    assert statistics_dtype(torch.float64) == torch.float64
    assert eigh(torch.eye(2, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_matrix_power() -> None:
    X = draw(2, 4, 4)
    A = X @ X.mT
    assert_close(matrix_power(A, 0.5) @ matrix_power(A, 0.5), A, rtol=1e-10, atol=1e-10)
    assert_close(matrix_power(A, -1.0), torch.linalg.inv(A), rtol=1e-9, atol=1e-9)
    u = draw(4, 1)
    assert_close(matrix_power(u @ u.T, 0.25), u @ u.T / u.norm() ** 1.5, rtol=1e-10, atol=1e-10)
    assert_close(matrix_power(torch.zeros(2, 2), -0.5, floor=4.0), 0.5 * torch.eye(2))
    assert_close(matrix_power(-torch.eye(2), 0.5), torch.zeros(2, 2))


def test_all_finite() -> None:
    assert all_finite([]) and all_finite([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    assert not all_finite([torch.ones(2), torch.tensor([torch.inf])])


def test_full_precision_undoes_autocast_and_tf32_and_puts_them_back() -> None:
    A = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (A @ A).dtype == torch.bfloat16
            with pytest.raises(KeyError), full_precision("cpu"):
                assert (A @ A).dtype == torch.float32
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                raise KeyError
            assert (A @ A).dtype == torch.bfloat16
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class Refresh:
    """A solver that fails until it is content, and remembers what it was asked."""

    def __init__(self, content: Any, error: Exception | None = None) -> None:
        self.content, self.error, self.asked = content, error or SolverFailure("injected"), []

    def __call__(self, operator: Operator, damping: Damping) -> dict[str, Any]:
        self.asked.append((operator.dtype, operator.device.type, float(damping.value)))
        if not self.content(operator, damping):
            raise self.error
        return {"nested": {"d": operator.diagonal()}, "pivots": torch.ones(1, dtype=torch.int32), "damping": float(damping.value)}


single = Diagonal(torch.tensor([1.0, 3.0]))


def test_rung_ok() -> None:
    refresh = Refresh(lambda C, damping: True)
    state, rung = climb(refresh, single, Tikhonov(0.5))
    assert rung == "ok" and refresh.asked == [(torch.float32, "cpu", 0.5)] and state["damping"] == 0.5


@pytest.mark.parametrize(
    "error", [SolverFailure("x"), RuntimeError("cusolver error: 7"), RuntimeError("linalg.eigh: no"), numerics.LinAlgError("x")]
)
def test_rung_float64(error: Exception) -> None:
    state, rung = climb(Refresh(lambda C, damping: C.dtype == torch.float64, error), single, Tikhonov(0.5))
    assert rung == "float64"
    assert state["nested"]["d"].dtype == torch.float32 and state["pivots"].dtype == torch.int32


def test_rung_float64_with_a_true_failure() -> None:
    a = 1 - 2**-22  # the second pivot is 5e-7: noise in float32, which cannot tell it from zero, and a good pivot in float64
    A = torch.tensor([[1.0, a], [a, 1.0]])
    state, rung = climb(lambda C, damping: Cholesky().init(C, damping), Dense(A), Tikhonov(0.0))
    assert rung == "float64" and state["factor"].dtype == torch.float32
    L = state["factor"]
    assert_close(L @ L.T, A)


def test_rung_damping_in_float64_ten_times_more_each_time() -> None:
    refresh = Refresh(lambda C, damping: damping.value > 40)
    state, rung = climb(refresh, single, Tikhonov(0.5))
    assert rung == "damping" and state["damping"] == 50
    assert [asked[0] for asked in refresh.asked] == [torch.float32, torch.float64, torch.float64, torch.float64]
    assert [asked[2] for asked in refresh.asked] == [0.5, 0.5, 5.0, 50.0]


def test_rung_damping_from_zero_starts_at_the_scale_of_the_operator() -> None:
    refresh = Refresh(lambda C, damping: damping.value > 1e-7)
    climb(refresh, single, Tikhonov(0.0))
    assert_close(torch.tensor([asked[2] for asked in refresh.asked[2:]]), torch.tensor([2e-8, 2e-7]))


class Elsewhere(Diagonal):
    """Says that it is on an accelerator until it is moved."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        return Elsewhere(self.values.to(dtype)) if device is None else Diagonal(self.values.to(dtype))


def test_rung_cpu_comes_last_with_the_damping_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_cast", lambda state, dtype, device: state)  # there is no accelerator to go back to
    refresh = Refresh(lambda C, damping: C.device.type == "cpu")
    _, rung = climb(refresh, Elsewhere(torch.ones(2)), Tikhonov(0.5), retries=1)
    assert rung == "cpu"
    assert refresh.asked[-1] == (torch.float64, "cpu", 0.5) and [a[1] for a in refresh.asked] == ["cuda"] * 3 + ["cpu"]
    with pytest.raises(SolverFailure):
        climb(refresh, Elsewhere(torch.ones(2)), Tikhonov(0.5), retries=1, cpu=False)


def test_a_state_that_is_not_finite_is_a_failure() -> None:
    def refresh(C: Operator, damping: Damping) -> dict[str, Any]:
        return {"x": {"y": torch.tensor([torch.nan if C.dtype == torch.float32 else 1.0], dtype=C.dtype)}}

    assert climb(refresh, single, Tikhonov(0.1))[1] == "float64"

    def overflowing(C: Operator, damping: Damping) -> dict[str, Any]:  # finite in float64, not in the dtype it must come back in
        return {"x": torch.tensor([1e300 if damping.value < 1 else 1.0], dtype=C.dtype)}

    assert climb(overflowing, single, Tikhonov(0.5))[1] == "damping"


def test_every_rung_failing_raises_and_says_what_each_said() -> None:
    refresh = Refresh(lambda C, damping: False)
    with pytest.raises(SolverFailure, match=r"ok: injected; float64: injected; damping: injected"):
        climb(refresh, single, Tikhonov(0.5), retries=2)
    assert len(refresh.asked) == 4


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        climb(Refresh(lambda C, damping: False, RuntimeError("out of memory")), single, Tikhonov(0.5))
    with pytest.raises(KeyError):
        climb(Refresh(lambda C, damping: False, KeyError("a bug")), single, Tikhonov(0.5))


def test_an_operator_that_is_not_finite_never_reaches_the_solver() -> None:
    refresh = Refresh(lambda C, damping: True)
    with pytest.raises(SolverFailure, match="not finite"):
        climb(refresh, Diagonal(torch.tensor([1.0, torch.nan])), Tikhonov(0.5))
    assert refresh.asked == []


def test_a_matrix_free_operator_only_takes_more_damping() -> None:
    C = MatrixFree(lambda v: 2 * v, 2, torch.float32, "cpu")
    asked = []

    def refresh(C: Operator, damping: Damping) -> dict[str, Any]:
        asked.append((C.dtype, float(damping.value)))
        if damping.value < 1e-7:
            raise SolverFailure("injected")
        return {}

    assert climb(refresh, C, Tikhonov(0.0))[1] == "damping"
    assert [dtype for dtype, _ in asked] == [torch.float32] * 3
    assert_close(torch.tensor([value for _, value in asked]), torch.tensor([0.0, 2e-8, 2e-7]))
