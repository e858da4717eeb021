"""Peak memory and time of the exact Gauss-Newton matrix with a thousand classes, over a plain training step's.

Run `python benchmarks/column_memory.py` (--help for the options). What is measured, at batch 32 and 1,000 classes by default:

* "step": forward, backward and update with `torch.optim.SGD(lr=0, momentum=0.9)`, two steps, building the network included;
* "ggn x kron_io": `precond.curvature` of the same network on the same batch, building the network included. It sends back one column a
  class, a few at a time, and adds each to its factors. Memory and time are those of the first --columns of them, as every further one
  does the same again; the time is then multiplied up to all of them;
* "factors": the bytes of the result, which any way to take it holds in the end;
* memory: the most bytes that tensors hold at once, temporaries included (`precond.compare.memory`);
* time: wall time. Sending back a column is a backward pass without weight gradients, so "floor" is that pass alone, by plain
  torch on a graph that is kept, times the number of columns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

BUDGET = 1.5


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, and a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.short: nn.Module = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))
        )
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.body(x) + self.short(x))
        return out


def network(name: str, classes: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The network and the shape of one example."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes)
        ), (784,)  # fmt: skip
    if name == "conv":
        sizes = ((3, 16), (16, 32), (32, 64))
        stages = [m for i, o in sizes for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
        return nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 16, 512), nn.ReLU(), nn.Linear(512, classes)), (3, 32, 32)
    stem = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    body = [Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, classes)]
    return nn.Sequential(*stem, *body, *head), (3, 32, 32)


@dataclass(frozen=True)
class Row:
    """What was found for one network; bytes and seconds."""

    network: str
    parameters: int
    step_bytes: int
    curvature_bytes: int
    factor_bytes: int
    ratio: float
    step_seconds: float
    curvature_seconds: float
    floor_seconds: float


def step(name: str, classes: int, inputs: Tensor, targets: Tensor, count: int) -> Callable[[], None]:
    def work() -> None:
        model = network(name, classes)[0].to(inputs.device)
        criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for _ in range(count):
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()

    return work


@dataclass(frozen=True, kw_only=True)
class FirstColumns(precond.matrices.get("ggn")):  # type: ignore[misc]
    """The first `columns` columns of the Gauss-Newton matrix; all of them where it is None."""

    columns: int | None = None

    def chunks(self, context: Any, limit: int) -> Iterator[Tensor]:
        sent = 0
        for chunk in super().chunks(context, limit):
            yield chunk
            sent += len(chunk)
            if self.columns is not None and sent >= self.columns:
                return


def curvature(name: str, classes: int, inputs: Tensor, targets: Tensor, columns: int | None = None) -> precond.operators.Operator:
    model = network(name, classes)[0].to(inputs.device)
    matrix = FirstColumns(columns=columns)
    return precond.curvature(model, nn.CrossEntropyLoss(), inputs, targets, matrix=matrix, repr="kron_io", seed=0)


def floor(name: str, classes: int, inputs: Tensor) -> float:
    """Seconds of one backward pass to the output of the first layer, times the number of classes."""
    model = network(name, classes)[0].to(inputs.device)
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    seen: list[Tensor] = []
    handle = first.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(inputs)
    handle.remove()
    column = torch.randn_like(output)
    passes = 5
    elapsed = seconds(lambda: [torch.autograd.grad(output, seen, column, retain_graph=True) for _ in range(passes)], inputs.device)
    return elapsed / passes * classes


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(name: str, batch: int, classes: int, columns: int, device: torch.device) -> Row:
    model, shape = network(name, classes)
    inputs, targets = torch.randn(batch, *shape, device=device), torch.randint(classes, (batch,), device=device)
    plain = peak_bytes(step(name, classes, inputs, targets, 2), device)
    found: list[precond.operators.Operator] = []
    ours = peak_bytes(lambda: found.append(curvature(name, classes, inputs, targets, columns)), device)
    held = sum(t.numel() * t.element_size() for t in found[0].blocks.values() for t in t.tensors())  # type: ignore[attr-defined]
    found.clear()
    training = seconds(step(name, classes, inputs, targets, 5), device) / 5
    return Row(
        name, sum(p.numel() for p in model.parameters()), plain, ours, held, ours / plain, training,
        seconds(lambda: curvature(name, classes, inputs, targets, columns), device) * classes / columns, floor(name, classes, inputs),
    )  # fmt: skip


def show(rows: list[Row]) -> None:
    head = ["network", "parameters", "step MiB", "ggn x kron_io MiB", "of it factors", "ratio", "step ms", "ggn x kron_io s", "floor s"]
    lines = [head]
    for r in rows:
        sizes = [f"{b / 2**20:.1f}" for b in (r.step_bytes, r.curvature_bytes, r.factor_bytes)]
        times = [f"{1e3 * r.step_seconds:.1f}", f"{r.curvature_seconds:.1f}", f"{r.floor_seconds:.1f}"]
        lines.append([r.network, f"{r.parameters:,}", *sizes, f"{r.ratio:.2f}", *times])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of exact ggn x kron_io over a plain training step's.")
    parser.add_argument("--networks", nargs="+", choices=("mlp", "conv", "resnet"), default=["mlp", "conv", "resnet"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--columns", type=int, default=32, help="how many are sent back and measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device(options.device)
    rows = [measure(name, options.batch, options.classes, options.columns, device) for name in options.networks]
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores, {options.threads} threads"
    about = {"batch": options.batch, "classes": options.classes, "machine": f"{platform.machine()} {on}, torch {torch.__version__}"}
    within = all(row.ratio <= BUDGET for row in rows)
    if options.json:
        print(json.dumps({**about, "budget": BUDGET, "within": within, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    show(rows)
    print(f"budget {BUDGET}: {'met' if within else 'exceeded'}")


if __name__ == "__main__":
    main()
