"""What DistributedDataParallel claims: parameters after every step equal those of one process on the whole batch, at 1e-10 in float64.

* For K-FAC (recorded labels, and exact), EK-FAC with an average, Shampoo, Hessian-free (CG at 1e-13), the empirical Fisher by layers, the
  full Hessian, rows that ranks concatenate (a window of exact columns, Gram matrices by layer, by unit and centred, SENG's), sketches and
  eigenpairs of the Hessian, sparse networks, masked entries and pruned diagonals; on an MLP and on
  convolutions; with DDP's own options for buckets and unused parameters;
* with equal batches and plain mean losses; with unequal batches where each rank's loss is weighted by n_r * world / N; with gradient
  accumulation under `no_sync`; with loss_weights="given";
* a rank with NaN data contributes weight zero to the statistics: later steps are those of one process that saw only the others' data;
* all ranks hold the same parameters, to the last bit, also where an update is rejected or shortened by the mean of their losses;
* drawn labels differ between ranks, and are the same when drawn again;
* a worker that hangs or raises is reported by rank within a time limit, and none is left behind (the harness itself).
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from filelock import FileLock
from torch import Tensor

import distributed_workers as workers
from precond.likelihoods.categorical import Categorical
from precond.randomness import keyed_generator

WORLD = 2
LIMIT, STALL = 150.0, 30.0  # seconds for everything, and for one case


def spawn(folder: Path, stall: float = STALL, misbehave: str = "") -> list[dict[str, Tensor]]:
    """Run all cases on `WORLD` ranks, kill them at the time limits, and say what each of them was doing."""
    context = mp.spawn(workers.worker, args=(WORLD, str(folder), misbehave), nprocs=WORLD, join=False)
    start, notes = time.time(), [folder / f"rank{r}.doing" for r in range(WORLD)]
    try:
        while not context.join(timeout=0.5):
            now, written = time.time(), all(note.exists() for note in notes)
            if now - start > LIMIT or (written and now - max(note.stat().st_mtime for note in notes) > stall):
                doing = [f"rank {r}: {note.read_text() if note.exists() else 'starting'}" for r, note in enumerate(notes)]
                alive = [text for text, process in zip(doing, context.processes, strict=True) if process.is_alive()]
                raise TimeoutError(f"given up after {now - start:.0f} s; still at work are {'; '.join(alive)}.")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> list[dict[str, Tensor]]:
    """Spawned once, also where pytest itself has several workers."""
    folder = tmp_path_factory.getbasetemp().parent / f"ddp-{testrun_uid}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            return spawn(folder)
    found = [folder / f"rank{r}.pt" for r in range(WORLD)]
    assert all(path.exists() for path in found), "the run failed in the pytest worker that started it"
    return [torch.load(path, weights_only=True) for path in found]


@pytest.fixture
def fixed_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Categorical, "sample", Categorical.sample)  # put back at the end
    workers.fix_labels()


@pytest.mark.parametrize("name", workers.CASES)
@pytest.mark.usefixtures("fixed_labels")
def test_ranks_take_the_steps_of_one_process(name: str, ranks: list[dict[str, Tensor]]) -> None:
    expected = workers.single(workers.CASES[name])
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(ranks[0][name], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ranks[1][name], ranks[0][name], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, case in workers.CASES.items() if case.nan])
def test_a_rank_with_nan_moves_nothing_and_training_goes_on(name: str, ranks: list[dict[str, Tensor]]) -> None:
    path = ranks[0][name]
    torch.testing.assert_close(path[workers.NAN_STEP], path[workers.NAN_STEP - 1], rtol=0, atol=0)
    assert not torch.equal(path[workers.NAN_STEP + 1], path[workers.NAN_STEP])


@pytest.mark.parametrize("method", ["kfac", "kfac_exact", "empirical_layer"])
def test_the_data_of_the_other_ranks_counts_in_a_step_with_nan(method: str, ranks: list[dict[str, Tensor]]) -> None:
    """Negative control: without their data in that step, or with the whole batch in one process, the later steps are others."""
    plain = workers.single(workers.Case(workers.METHODS[method]))
    assert (ranks[0][f"{method}-nan"][-1] - plain[-1]).abs().max() > 1e-6


@pytest.mark.parametrize("method", workers.METHODS)
def test_how_the_batch_is_split_does_not_matter(method: str, ranks: list[dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ranks[0][f"{method}-unequal"], ranks[0][f"{method}-equal"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", workers.CONTROLS)
def test_unequal_batches_need_their_weights(name: str, ranks: list[dict[str, Tensor]]) -> None:
    """Negative control: without the weights n_r * world / N the ranks' losses are another mean."""
    assert (ranks[0][name] - workers.single(workers.CONTROLS[name])).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["reject", "backtrack"])
def test_an_update_is_taken_back_on_all_ranks_alike(name: str, ranks: list[dict[str, Tensor]]) -> None:
    """By the mean loss; that they hold the same parameters in each step is shown above. Control: by its own loss each rank goes its own way."""
    path = ranks[0][f"{name}-unequal"]
    stays = [bool(torch.equal(a, b)) for a, b in zip(path[1:], path[:-1], strict=True)]
    whole = workers.single(workers.replace(workers.CASES[f"{name}-unequal"], make=workers._cell("ggn", "layer", "cholesky")))
    assert not torch.equal(path[-1], whole[-1]) and (not all(stays)), "some of it stays, and not all"
    assert name != "reject" or any(stays)
    assert not torch.equal(ranks[0]["reject-alone"], ranks[1]["reject-alone"])


def test_labels_are_drawn_by_rank() -> None:
    likelihood, output = Categorical(), torch.zeros(64, 3, dtype=torch.float64)
    target = torch.zeros(64, dtype=torch.long)
    first, again, other = (likelihood.sample(output, target, keyed_generator(output.device, 5, 0, 0, rank, 0)) for rank in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_a_hanging_rank_is_reported_and_killed(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="still at work are rank 0: the case 'hang'; rank 1: the case 'hang'"):
        spawn(tmp_path, stall=3.0, misbehave="hang")


def test_a_raising_rank_is_reported(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"(?s)Process 1 terminated.*raised on purpose"):
        spawn(tmp_path, misbehave="raise")
