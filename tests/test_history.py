"""Claims about histories and schedules:

- each history reads what its formula says, entry by entry, with entries that start at different times;
- an observation that is not valid changes nothing, even when it holds NaN; an entry never updated reads as zeros;
- the debiased average of a constant is that constant from the first step (identity 31), without debiasing it is not;
- local entries pass through and are always replaced; what a history cannot merge is refused; nothing given is changed in place;
- nothing waits for the device, and state is tensors, so that saving and going on is exact to the bit.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from precond.errors import InvalidCombination, UnknownName
from precond.history import Ema, History, Local, Mean, Sum, Window, resolve
from precond.schedule import Schedule
from precond.schedule import resolve as resolve_schedule
from precond.statistics import Stat, Statistics

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
SPEC = {"A": Stat("mean", form="matrix"), "d": Stat("mean", form="diagonal"), "m": Stat("mean"), "U": Stat("rows"), "live": Stat("local")}
XS = [torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(5)]
AVERAGING: dict[str, History] = {
    "ema": Ema(0.9),
    "ema_biased": Ema(0.9, debias=False),
    "martens": Ema(0.7, schedule="martens"),
    "first": Ema(0.7, schedule="first"),
    "sum": Sum(0.5),
    "sum_decay": Sum(0.5, decay=0.8),
    "mean": Mean(),
    "window": Window(3),
    "window_sum": Window(3, reduction="sum"),
    "window_padded": Window(7, reduction="padded"),
    "window_decay": Window(3, decay=0.5),
    "window_sum_decay": Window(3, reduction="sum", decay=0.5),
    "local": Local(),
}
every = pytest.mark.parametrize("history", AVERAGING.values(), ids=AVERAGING.keys())
no, yes = torch.tensor(False), torch.tensor(True)


def run(history: History, xs: list[Tensor], name: str = "A", valid: list[Tensor | None] | None = None) -> Statistics:
    kept: Statistics | None = None
    for x, flag in zip(xs, valid or [None] * len(xs), strict=True):
        kept = history.merge(kept, {name: x}, SPEC, flag)
    assert kept is not None
    return kept


def read(history: History, kept: Statistics, name: str = "A") -> Tensor:
    out: Tensor = history.read(kept, SPEC)[name]
    return out


def expected(name: str) -> Tensor:
    """By hand, over the five observations."""
    if name.startswith("ema"):
        value, weight = torch.zeros_like(XS[0]), 0.0
        for x in XS:
            value, weight = 0.9 * value + 0.1 * x, 0.9 * weight + 0.1
        return value / weight if name == "ema" else value
    if name == "martens":
        value = XS[0]
        for t, x in enumerate(XS[1:], start=2):
            beta = min(1 - 1 / t, 0.7)
            value = beta * value + (1 - beta) * x
        return value
    if name == "first":
        value = XS[0]
        for x in XS[1:]:
            value = 0.7 * value + 0.3 * x
        return value
    if name == "sum_decay":
        return 0.8**5 * 0.5 * torch.eye(2, dtype=torch.float64) + sum(0.8 ** (4 - t) * x for t, x in enumerate(XS))
    if name.endswith("decay"):
        return (0.25 * XS[2] + 0.5 * XS[3] + XS[4]) / (1.0 if name == "window_sum_decay" else 1.75)
    if name == "window_padded":
        return sum(XS) / 7
    total = {"sum": 0.5 * torch.eye(2, dtype=torch.float64) + sum(XS), "mean": sum(XS) / 5, "window_sum": sum(XS[2:]), "local": XS[4]}
    return total.get(name, sum(XS[2:]) / 3)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("name", AVERAGING)
def test_reads_what_its_formula_says(name: str) -> None:
    assert_close(read(AVERAGING[name], run(AVERAGING[name], XS)), expected(name), **EXACT)


@every
def test_an_invalid_observation_changes_nothing(history: History) -> None:
    bad = torch.full((2, 2), torch.nan, dtype=torch.float64)
    kept = run(history, [XS[0], bad, XS[1], bad], valid=[yes, no, yes, no])
    clean = run(history, XS[:2])
    assert kept.keys() == clean.keys()
    for key, value in clean.items():
        assert_close(kept[key], value, rtol=0, atol=0)
    with pytest.raises(AssertionError):  # negative: marked valid, it does
        assert_close(read(history, run(history, [XS[0], bad, XS[1], bad], valid=[yes, no, yes, yes])), read(history, clean))


@every
def test_an_entry_never_updated_reads_as_zeros_and_starts_well(history: History) -> None:
    bad = torch.full((2, 2), torch.inf, dtype=torch.float64)
    kept = run(history, [bad], valid=[no])
    assert_close(read(history, kept), torch.zeros_like(bad))
    after = history.merge(kept, {"A": XS[0]}, SPEC, yes)
    assert_close(read(history, after), read(history, run(history, XS[:1])), rtol=0, atol=0)


@every
def test_entries_start_at_different_times(history: History) -> None:
    kept = history.merge(run(history, XS[:3]), {"m": XS[0]}, SPEC)
    assert_close(read(history, kept, "m"), read(history, run(history, XS[:1], "m"), "m"), rtol=0, atol=0)
    assert_close(read(history, kept), read(history, run(history, XS[:3])), rtol=0, atol=0)  # what is not in the new one stays
    assert set(history.read(kept, SPEC)) == {"A", "m"}  # nothing that the history keeps beside


@every
def test_nothing_given_is_changed_and_dtypes_are_kept(history: History) -> None:
    first, x = run(history, [XS[0].float()]), XS[1].float()
    copies = {key: value.clone() for key, value in first.items()}
    second = history.merge(first, {"A": x}, SPEC)
    for key, value in first.items():
        assert_close(value, copies[key], rtol=0, atol=0)
    assert_close(x, XS[1].float(), rtol=0, atol=0)
    assert read(history, second).dtype == torch.float32
    scalar = history.merge(history.merge(None, {"m": torch.tensor(1.0)}, SPEC), {"m": torch.tensor(2.0)}, SPEC)
    assert read(history, scalar, "m").dtype == torch.float32 and read(history, scalar, "m").shape == ()


@every
def test_saved_and_gone_on_is_exact_to_the_bit(history: History) -> None:
    kept = run(history, XS[:3])
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    going, gone = history.merge(kept, {"A": XS[3]}, SPEC), history.merge(loaded, {"A": XS[3]}, SPEC)
    for key, value in going.items():
        assert_close(gone[key], value, rtol=0, atol=0)


@every
def test_nothing_waits_for_the_device(history: History) -> None:
    x, valid = torch.empty(2, 2, device="meta"), torch.empty((), dtype=torch.bool, device="meta")  # reading these on the host raises
    spec = {name: SPEC[name] for name in ("A", "d", "m")} | ({"U": SPEC["U"]} if history.supports(SPEC["U"]) else {})
    kept: Statistics | None = None
    for _ in range(2):
        kept = history.merge(kept, dict.fromkeys(spec, x), spec, valid)
    assert history.read(kept or {}, spec)["A"].shape == (2, 2)
    with pytest.raises((RuntimeError, NotImplementedError)):  # negative
        bool(valid)


@every
def test_local_entries_pass_through_and_a_stale_one_never_survives(history: History) -> None:
    first, second = object(), object()
    kept = history.merge(history.merge(None, {"live": first}, SPEC), {"live": second}, SPEC, no)
    assert kept["live"] is second and history.read(kept, SPEC)["live"] is second


@every
def test_a_changed_shape_or_an_undeclared_entry_is_refused(history: History) -> None:
    with pytest.raises(ValueError, match="not declared"):
        history.merge(None, {"B": XS[0]}, SPEC)
    if not isinstance(history, Local):
        with pytest.raises(ValueError, match="changed its shape"):
            history.merge(run(history, XS[:1]), {"A": torch.ones(1, 2, dtype=torch.float64)}, SPEC)


def test_the_debiased_average_of_a_constant_is_that_constant_from_the_first_step() -> None:
    for steps in (1, 2, 7):
        assert_close(read(Ema(0.9), run(Ema(0.9), [XS[0]] * steps)), XS[0], **EXACT)
    with pytest.raises(AssertionError):  # negative
        assert_close(read(Ema(0.9, debias=False), run(Ema(0.9, debias=False), [XS[0]])), XS[0], **EXACT)


def test_the_initial_value_of_a_sum_follows_the_form_and_enters_once() -> None:
    history, ones = Sum(0.5), torch.ones(3, 2, 2)
    kept = history.merge(None, {"A": ones, "d": ones, "m": ones}, SPEC)
    kept = history.merge(kept, {"A": ones, "d": ones, "m": ones}, SPEC)
    out = history.read(kept, SPEC)
    assert_close(out["A"], 2 * ones + 0.5 * torch.eye(2).expand(3, 2, 2))
    assert_close(out["d"], 2 * ones + 0.5)
    assert_close(out["m"], 2 * ones)


@pytest.mark.parametrize("history", [Ema(0.9), Sum(), Mean()])
def test_rows_do_not_average(history: History) -> None:
    assert not history.supports(SPEC["U"]) and history.supports(SPEC["m"]) and history.supports(SPEC["live"])
    with pytest.raises(InvalidCombination, match="rows do not average"):
        history.merge(None, {"U": XS[0]}, SPEC)


def test_a_window_of_rows_holds_the_last_observations_each_with_its_number_of_rows() -> None:
    rows = [torch.full((k, 2), float(k), dtype=torch.float64) for k in (1, 3, 2, 1)]
    for steps in (1, 2, 3, 4):
        kept = run(Window(2), rows[:steps], "U")
        last = torch.cat(rows[:steps][-2:])
        assert_close(read(Window(2), kept, "U"), last / min(steps, 2) ** 0.5, **EXACT)
        assert_close(read(Window(2, reduction="sum"), kept, "U"), last, **EXACT)
    assert Window(2).supports(SPEC["U"]) and Local().supports(SPEC["U"])
    assert_close(read(Local(), run(Local(), rows, "U"), "U"), rows[-1])


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1), (1, 3, 2, 1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "padded"])
def test_rows_of_a_window_age_with_their_gram_matrix(reduction: Any, counts: tuple[int, ...]) -> None:
    spec, kept, history = {"U": Stat("rows", gram=True), "a": Stat("rows", degree=0.0)}, None, Window(3, reduction=reduction, decay=0.6)
    rows = [torch.randn(k, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, k in enumerate(counts)]
    for steps, x in enumerate(rows, start=1):
        kept = history.merge(kept, {"U": x, "a": x}, spec)
        ages = [(r, 0.6**age) for age, r in enumerate(reversed(rows[:steps][-3:]))]
        total = {"mean": sum(w for _, w in ages), "sum": 1.0, "padded": 3.0}[reduction]
        out = history.read(kept, spec)
        assert_close(out["U"].T @ out["U"], sum(w * r.T @ r for r, w in ages) / total, **EXACT)
        assert_close(out["U.gram"], out["U"] @ out["U"].T, **EXACT)
        assert_close(out["a"], torch.cat(rows[:steps][-3:]), **EXACT)  # what does not scale with the loss does not age


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (1, 3, 2, 1)])
def test_an_invalid_observation_of_rows_adds_nothing(counts: tuple[int, ...]) -> None:
    rows = [torch.full((k, 2), i + 1.0, dtype=torch.float64) for i, k in enumerate(counts)]
    bad = [rows[0], torch.full_like(rows[1], torch.nan), *rows[2:]]
    gram = torch.zeros(2, 2, dtype=torch.float64)
    for r in (rows[0], rows[2]):
        gram += r.T @ r / 2
    U = read(Window(3), run(Window(3), bad[:3], "U", [yes, no, yes]), "U")
    assert_close(U.T @ U, gram, **EXACT)
    U = read(Window(1), run(Window(1), [torch.full((2, 2), torch.nan, dtype=torch.float64)], "U", [no]), "U")
    assert_close(U, torch.zeros(2, 2, dtype=torch.float64))


def test_resolve() -> None:
    assert resolve("local") == Local() and resolve(0.9) == Ema(0.9) and resolve(Window(3)) == Window(3)
    with pytest.raises(UnknownName, match="did you mean 'local'"):
        resolve("locl")
    for number in (0.0, 1.0, 1, -0.1, 2.0):
        with pytest.raises(ValueError, match="weight of the old value"):
            resolve(number)
    for wrong in (None, True):
        with pytest.raises(TypeError, match="history is 'local'"):
            resolve(wrong)  # type: ignore[arg-type]


def test_options_are_checked_when_made() -> None:
    with pytest.raises(ValueError, match="weight of the old value"):
        Ema(1.0)
    with pytest.raises(ValueError, match="martens"):
        Ema(0.9, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="initial value"):
        Sum(-1.0)
    for decay in (0.0, 1.1):
        with pytest.raises(ValueError, match="decay of a Sum"):
            Sum(decay=decay)
        with pytest.raises(ValueError, match="decay of a Window"):
            Window(2, decay=decay)
    with pytest.raises(ValueError, match="at least 1"):
        Window(0)
    with pytest.raises(ValueError, match="reduction"):
        Window(2, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind of a statistic"):
        Stat("median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form of a statistic"):
        Stat("mean", form="square")  # type: ignore[arg-type]


def test_a_schedule_is_due_at_its_interval_or_when_its_function_says_so() -> None:
    assert [s for s in range(9) if Schedule(4).due(s)] == [0, 4, 8]
    assert [s for s in range(9) if resolve_schedule(lambda step: step in (1, 5)).due(s)] == [1, 5]
    assert resolve_schedule(Schedule(2)) == resolve_schedule(2)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match="at least 1 step"):
            Schedule(wrong)
    for kind in (1.5, "10", True):
        with pytest.raises(TypeError, match="number of steps"):
            Schedule(kind)  # type: ignore[arg-type]
