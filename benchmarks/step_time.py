"""Step time and peak memory over SGD's: ours beside ASDL's, in one run, on the same weights.

Run `python benchmarks/step_time.py` (--help for the options). What is measured:

* every contender trains its own copy of one network on one batch with `torch.optim.SGD(lr=0)` as its outer update, so that the weights
  stay what they are; T is the interval of both the curvature and the solver (`curvature_interval = solver_interval = T`);
* a round is one block of every contender, in turn (A B C A B C ...): T steps, of which the first observes and refreshes, at least 4;
* time: the median over rounds of the mean step of a block, divided by the median of SGD's;
* memory: the peak bytes of two steps, building the network included, divided by SGD's (`precond.compare.memory`);
* "nothing due": forward and backward alone with a preconditioner attached that is never due, over the same without one.

The peers do the same method with other details, their own defaults: ASDL's K-FAC inverts at every update by Cholesky with pi-damping, as
ours; its Shampoo takes roots by coupled Newton iteration and leaves biases alone. ASDL (`asdfghjkl`) is under the MIT licence.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a checkout that is not installed

import precond
from precond.compare.memory import peak_bytes

INTERVALS = (1, 10, 100)
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """One network, one batch."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def sgd(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)


@dataclass(frozen=True)
class Contender:
    """`build` makes a network and returns its training step. `base`: whose time and memory its own are divided by."""

    label: str
    source: str
    interval: int | None
    build: Callable[[], Step]
    base: str = "SGD"

    @property
    def block(self) -> int:
        return max(self.interval or 1, 4 if self.interval else 20)


@dataclass(frozen=True)
class Row:
    """What was found for one contender."""

    label: str
    source: str
    interval: int | None
    milliseconds: float
    time: float
    peak_bytes: int
    memory: float
    base: str


def setting(name: str, batch: int, device: torch.device) -> Setting:
    torch.manual_seed(0)
    if name == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        inputs = torch.randn(batch, 784)
    else:
        convolutions = [m for i, o in ((1, 16), (16, 32), (32, 32)) for m in (nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU())]
        model, inputs = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10)), torch.randn(batch, 1, 28, 28)
    return Setting(model.to(device), inputs.to(device), torch.randint(10, (batch,)).to(device))


def _loop(at: Setting, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, *, update: bool = True) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        criterion(model(at.inputs), at.targets).backward()
        if update:
            optimizer.step()

    return step


def plain(at: Setting, make: Callable[[nn.Module], torch.optim.Optimizer], *, update: bool = True) -> Step:
    model = at.fresh()
    return _loop(at, model, nn.CrossEntropyLoss(), make(model), update=update)


def ours(at: Setting, recipe: str, due: int | Callable[[int], bool], *, update: bool = True) -> Step:
    model, criterion = at.fresh(), nn.CrossEntropyLoss()
    optimizer = at.sgd(model)
    precond.recipe(recipe, curvature_interval=due, solver_interval=due).attach(model, criterion, optimizer)
    return _loop(at, model, criterion, optimizer, update=update)


def theirs(at: Setting, maker: str, interval: int, **config: Any) -> Step:
    import asdl

    model, criterion = at.fresh(), nn.CrossEntropyLoss()
    optimizer = at.sgd(model)
    settings = asdl.PreconditioningConfig(
        data_size=len(at.inputs), preconditioner_upd_interval=interval, curvature_upd_interval=interval, **config
    )
    made = getattr(asdl, maker)(model, settings)

    def step() -> None:
        optimizer.zero_grad()
        output = made.setup_model_call(model, at.inputs)
        made.setup_loss_call(criterion, output, at.targets)
        made.forward_and_backward()
        optimizer.step()

    return step


def contenders(at: Setting, intervals: tuple[int, ...], *, peer: bool) -> Iterator[Contender]:
    bare = "fwd + bwd"
    yield Contender("SGD", "torch", None, lambda: plain(at, at.sgd))
    yield Contender(bare, "torch", None, lambda: plain(at, at.sgd, update=False), base=bare)
    yield Contender(
        f"{bare}, attached, nothing due", "precond", None, lambda: ours(at, "kfac", lambda step: False, update=False), base=bare
    )
    peers = {"kfac": ("KfacGradientMaker", {"damping": 1e-3, "ema_decay": 0.05}), "shampoo": ("ShampooGradientMaker", {"damping": 1e-4})}
    for recipe in ("kfac", "shampoo", "rmsprop"):
        for interval in intervals:
            yield Contender(recipe, "precond", interval, lambda recipe=recipe, interval=interval: ours(at, recipe, interval))
            if recipe in peers and peer:
                maker, config = peers[recipe]
                yield Contender(
                    recipe, "ASDL", interval, lambda maker=maker, interval=interval, config=config: theirs(at, maker, interval, **config)
                )
    yield Contender("rmsprop", "torch", 1, lambda: plain(at, lambda model: torch.optim.RMSprop(model.parameters(), lr=0.0)))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(step: Step, count: int, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The mean of `count` steps."""
    _synchronise(device)
    start = clock()
    for _ in range(count):
        step()
    _synchronise(device)
    return (clock() - start) / count


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(found: list[Contender], rounds: int, device: torch.device, clock: Callable[[], float], say: Callable[[str], None]) -> list[Row]:
    def two_steps(contender: Contender) -> None:
        step = contender.build()
        step()
        step()

    memory, steps = {}, []
    for contender in found:
        say(f"memory of {contender.label} ({contender.source}, T={contender.interval})")
        memory[contender] = peak_bytes(lambda contender=contender: two_steps(contender), device)
        steps.append(contender.build())
        seconds(steps[-1], contender.block, device)  # warm up by whole periods, so that every block starts with a refresh
    times: dict[Contender, list[float]] = {contender: [] for contender in found}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for contender, step in zip(found, steps, strict=True):
            times[contender].append(seconds(step, contender.block, device, clock))
    median = {contender: statistics.median(each) for contender, each in times.items()}
    rows = []
    for c in found:
        base = next(other for other in found if other.label == c.base)
        ratio, bytes_ratio = median[c] / median[base], memory[c] / memory[base]
        rows.append(Row(c.label, c.source, c.interval, 1e3 * median[c], ratio, memory[c], bytes_ratio, c.base))
    return rows


def cells(row: Row) -> list[str]:
    interval = "" if row.interval is None else str(row.interval)
    return [row.label, row.source, interval, f"{row.milliseconds:.2f}", f"{row.time:.2f}", f"{row.peak_bytes / 2**20:.1f}", f"{row.memory:.2f}"]


def show(rows: list[Row], title: str) -> None:
    head = ["method", "by", "T", "ms", "time / SGD", "peak MiB", "memory / SGD"]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [head, *(cells(row) for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        print(title, *("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines), sep="\n")
        return
    table = Table(title=title)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time and peak memory over SGD's, ours beside ASDL's.")
    parser.add_argument("--model", choices=("mlp", "conv"), default="mlp", help="MLP 784-256-256-10, or three convolutions and a Linear")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: CPU time of the process, on a machine that others use")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="T = 1 and 10, 2 rounds: does it run?")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device, rounds = torch.device(options.device), 2 if options.quick else options.rounds
    peer = importlib.util.find_spec("asdl") is not None
    if device.type == "cpu":  # ASDL marks ranges for a CUDA profiler, which a CPU build of torch refuses
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *message: 0
    at = setting(options.model, options.batch, device)
    say: Callable[[str], None] = (lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr)) if sys.stderr.isatty() else lambda text: None
    rows = measure(list(contenders(at, INTERVALS[:2] if options.quick else INTERVALS, peer=peer)), rounds, device, CLOCKS[options.clock], say)
    say("")
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores, {options.threads} threads"
    machine = f"{platform.machine()} {on}, {options.clock} time, torch {torch.__version__}"
    if options.json:
        about = {"model": options.model, "batch": options.batch, "rounds": rounds, "machine": machine}
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    show(rows, f"{options.model}, batch {options.batch}, {rounds} rounds; {machine}")
    if not peer:
        print("ASDL is not installed: `pip install --no-deps asdfghjkl==0.1a5` puts its rows beside ours.")


if __name__ == "__main__":
    main()
