"""Pure tensor functions that know about rounding, and the ladder a refresh climbs when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precond.errors import SolverFailure

if TYPE_CHECKING:  # the operators import this module
    from precond.damping import Damping
    from precond.operators import Operator

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # public, but not in its __all__

State = dict[str, Any]
"""What a solver keeps: tensors, numbers, strings and nested dicts of them."""

ROUNDING = 10.0
"""Multiples of the machine epsilon below which an eigenvalue or a pivot, relative to the largest, is noise."""


def symmetrise(A: Tensor) -> Tensor:
    """(A + A^T) / 2 over the last two dimensions of `A` (..., n, n)."""
    return (A + transposed(A)).div_(2)


def transposed(A: Tensor) -> Tensor:
    """A^T over the last two dimensions of `A` (..., n, n), to be read entry by entry."""
    if A.shape[:-2].numel() != 1:
        return A.mT
    return A.reshape(A.shape[-2:]).mT.contiguous().reshape(A.shape)  # torch copies one matrix in tiles: several times faster than reading it


def symmetric_product(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y of `X`, `Y` (..., n, n) where it is known to be symmetric: the blocks on and below the diagonal, little more than half a product, and their mirror.

    The result is symmetric to the last bit off the diagonal blocks, and to rounding in them.

    >>> symmetric_product(torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    n = Y.shape[-1]
    size = max(-(-n // 8), 64)  # below that the calls cost more than they save
    result = torch.empty_like(Y)
    for low in range(0, n, size):
        high = min(low + size, n)
        rows = X[..., low:high].mT @ Y[..., :high]
        result[..., low:high, :high] = rows
        result[..., :low, low:high] = rows[..., :low].mT
    return result


def round_off(eigenvalues: Tensor) -> Tensor:
    """Set eigenvalues (..., n) within rounding of zero to zero: both their size and their sign are noise there.

    What follows may raise them to a power such as 1/4, which would turn a noise of 1e-17 into 6e-5.
    """
    noise = ROUNDING * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().amax(-1, keepdim=True)
    return torch.where(eigenvalues.abs() <= noise, torch.zeros_like(eigenvalues), eigenvalues)


def powers_of_two(V: Tensor) -> Tensor:
    """For each column of `V` (n, k) the power of two nearest above its largest entry, within the normal numbers; 1 for a column of zeros.

    Division by it is exact, so that what follows is computed to the same bits wherever nothing would under- or overflow.

    >>> powers_of_two(torch.tensor([[3.0, 0.25, 0.0], [-1.0, 0.0, 0.0]]))
    tensor([4.0000, 0.5000, 1.0000])
    """
    largest = V.abs().amax(0) if len(V) else V.new_zeros(V.shape[1])
    limit = -round(math.log2(torch.finfo(V.dtype).tiny))  # that of the smallest normal number
    exponents = torch.frexp(largest).exponent.clamp(-limit, limit)
    return torch.where((largest > 0) & largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponents), 1.0)


def norm(v: Tensor) -> Tensor:
    """|v| of a vector (n,), 0-dim, where the squares of its entries under- or overflow as well.

    >>> norm(torch.tensor([3e30, 4e30])) / 1e30
    tensor(5.)
    """
    unit = powers_of_two(v.unsqueeze(1)).squeeze(0)
    length: Tensor = (v / unit).norm() * unit
    return length


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) in columns, of the symmetric part of `A` (..., n, n).

    Cost about 10 n^3 a matrix. A failure, or a result that is not finite, is tried again in float64; the result has the
    dtype of `A`. Half precision is computed in float32.

    Raises:
        SolverFailure: float64 failed as well.

    >>> eigh(torch.diag(torch.tensor([3.0, 1.0])))[0]
    tensor([1., 3.])
    """
    A = symmetrise(A)
    for dtype in dict.fromkeys((statistics_dtype(A.dtype), torch.float64)):
        try:
            d, U = torch.linalg.eigh(A.to(dtype))
        except LinAlgError:
            continue
        if bool(all_finite((d, U))):
            return d.to(A.dtype), U.to(A.dtype)
    raise SolverFailure(f"the eigendecomposition of shape {tuple(A.shape)} failed, in float64 too: check that its entries are finite.")


def matrix_power(A: Tensor, p: float, floor: float = 0.0) -> Tensor:
    """A^p of symmetric positive semi-definite matrices `A` (..., n, n), through `eigh`.

    Eigenvalues that are noise (`round_off`) or negative count as 0, and are then raised to at least `floor`; a negative power of 0 is
    infinite.

    >>> matrix_power(torch.diag(torch.tensor([4.0, 9.0])), 0.5).diagonal()
    tensor([2., 3.])
    """
    d, U = eigh(A)
    return symmetrise((U * round_off(d).clamp(min=floor).pow(p).unsqueeze(-2)) @ U.mT)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A 0-dim bool tensor on the device of the tensors: is every entry finite? Needs no host synchronisation.

    >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
    tensor(False)
    """
    # one pass a tensor without a mask: the extremes carry the NaN and infinity of every entry, and their difference both
    spans = [extremes.max - extremes.min for t in tensors if t.is_floating_point() and t.numel() for extremes in (torch.aminmax(t),)]
    return sum(spans[1:], spans[0]).isfinite() if spans else torch.tensor(True)


def where_valid(valid: Tensor, value: Tensor) -> Tensor:
    """`value` where the 0-dim flag is True, else zeros. A flag on the CPU can be read for nothing, and then a valid value is not copied.

    >>> where_valid(torch.tensor(False), torch.ones(2))
    tensor([0., 0.])
    """
    if valid.device.type == "cpu" and bool(valid):
        return value
    return torch.where(valid, value, 0.0)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of a model in `dtype` are kept: float32 at least.

    >>> statistics_dtype(torch.bfloat16), statistics_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Products inside run without autocast and without TF32, whatever the caller's context; the settings are put back."""
    switches = _tf32_switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, off in switches:
            setattr(owner, name, off)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """Owner, name and off position; newer versions of torch refuse to mix their own switch with the old one."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    if hasattr(cuda.matmul, "fp32_precision"):
        return [(cuda.matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]  # type: ignore[attr-defined]
    return [(cuda.matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]


def climb(
    refresh: Callable[[Operator, Damping], State], operator: Operator, damping: Damping, *, retries: int = 3, cpu: bool = True
) -> tuple[State, str]:
    """Refresh a solver, climbing one ladder as long as it fails; returns the state and the rung that worked.

    Rungs: "ok" (as given), "float64", "damping" (float64, damping x10, up to `retries` times), "cpu" (float64, damping as given).
    A rung fails by `SolverFailure`, by an error of torch's linear algebra, or by a state that is not finite. The state comes back in
    the dtype and on the device of the operator; on "ok" a solver may keep float64 by its own choice. A matrix-free operator cannot be
    cast, so it only climbs "ok" and "damping".

    Raises:
        SolverFailure: the operator is not finite, or every rung failed; the message lists what each one said.
    """
    if not bool(all_finite(operator.tensors())):
        raise SolverFailure("the operator holds entries that are not finite: drop this observation and keep the last good state.")
    said: list[str] = []
    for rung, candidate, damped in _rungs(operator, damping, retries, cpu):
        try:
            state = refresh(candidate, damped)
        except (SolverFailure, RuntimeError) as error:
            if not _is_linear_algebra(error):
                raise
            said.append(f"{rung}: {error}")
            continue
        if candidate is not operator:
            state = _cast(state, operator.dtype, operator.device)
        if bool(all_finite(_leaves(state))):  # after the cast: what float64 can hold may overflow in float32
            return state, rung
        said.append(f"{rung}: the state is not finite")
    raise SolverFailure("no rung of the ladder could invert the operator; " + "; ".join(said))


def _rungs(operator: Operator, damping: Damping, retries: int, cpu: bool) -> Iterator[tuple[str, Operator, Damping]]:
    yield "ok", operator, damping
    double = operator if operator.live else operator.to(dtype=torch.float64)
    if double.dtype != operator.dtype:
        yield "float64", double, damping
    boosted = damping
    for _ in range(retries):
        boosted = boosted.boosted(10.0, double)
        yield "damping", double, boosted
    if cpu and not operator.live and operator.device.type != "cpu":
        yield "cpu", double.to(device="cpu"), damping


def _is_linear_algebra(error: Exception) -> bool:
    if isinstance(error, (SolverFailure, LinAlgError)):
        return True
    return any(word in str(error).lower() for word in ("linalg", "cusolver"))


def _cast(state: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """What the ladder widened, as it was: integers stay."""
    if isinstance(state, dict):
        return {key: _cast(value, dtype, device) for key, value in state.items()}
    if not isinstance(state, Tensor):
        return state
    return state.to(device=device, dtype=dtype if state.dtype == torch.float64 else state.dtype)


def _leaves(state: Any) -> Iterator[Tensor]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, Tensor):
        yield state
