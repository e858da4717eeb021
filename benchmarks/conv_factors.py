"""The input factor of a convolution by patches and by lags: time, peak memory, and what the cost model takes.

Run `python benchmarks/conv_factors.py` (--help for the options). What is measured, in float32, for convolutions of stride 1 as in residual
networks and some small ones, kernel k, padding k // 2:

* patches: rows of patches, some examples at a time, and their products; lags: `patch_second_moment`, products of shifted images. Both make
  the sum of a a^T with the homogeneous coordinate, of all examples;
* time: the median over rounds, both in turn. It is the CPU time of the process, which other work on the machine changes little; with
  several threads it is that of all of them;
* memory: the peak bytes of one call beyond the input, the result (n^2 numbers) included;
* model: the ratio that `precond.layers.lag_cost` counts from the shapes, and what is taken by it. Its constants are fitted to such
  measurements.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a checkout that is not installed

from precond.blocks import Block
from precond.compare.memory import peak_bytes
from precond.layers.conv import lines, patch_second_moment
from precond.layers.lag_cost import by_lags, by_patches
from precond.observe import LayerColumns, Part
from precond.partition import Partition
from precond.representations.inputs import few_examples, input_rows, input_sums

SHAPES = [  # examples, channels, pixels, kernel, groups
    (32, 3, 32, 3, 1), (32, 3, 32, 7, 1), (32, 16, 32, 3, 1), (32, 64, 32, 3, 1), (32, 64, 56, 3, 1), (32, 128, 28, 3, 1),
    (32, 256, 14, 3, 1), (32, 512, 7, 3, 1), (4, 512, 7, 3, 1), (1, 512, 7, 3, 1), (32, 64, 32, 3, 64), (32, 32, 16, 5, 1),
    (4, 128, 8, 3, 1), (1, 64, 7, 3, 1), (32, 8, 8, 3, 1), (1, 8, 8, 3, 1),
]  # fmt: skip


def by_rows(block: Block, part: Part) -> Tensor:
    """As the library makes it of patches."""
    total: Tensor | None = None
    for piece in few_examples(part, block):
        found, _ = input_sums(input_rows(piece, block), torch.float32)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def measure(shape: tuple[int, int, int, int, int], rounds: int) -> dict[str, Any]:
    examples, channels, pixels, kernel, groups = shape
    torch.manual_seed(0)
    module = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups)
    x, one = torch.randn(examples, channels, pixels, pixels), torch.ones((), dtype=torch.float64)
    block = Partition(nn.Sequential(module)).blocks(["0"], "matrix")[0]
    part = Part(one, one, examples, {"0": (LayerColumns("0", module, (x,), {}, (None,), True, examples),)})
    ways: dict[str, Callable[[], Tensor]] = {"patches": lambda: by_rows(block, part), "lags": lambda: patch_second_moment(x, module, True)[0]}
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            if turn:  # the first warms up
                times[name].append(1e3 * (time.process_time() - start))
    error = float((results["lags"].squeeze(0) - results["patches"]).norm() / results["patches"].norm())
    del results
    counted = [count(examples, channels, groups, lines(module, x.shape[2:]), 4).total() for count in (by_patches, by_lags)]
    spent = {name: statistics.median(t) for name, t in times.items()}
    return {
        "shape": shape, **spent, "faster": spent["patches"] / spent["lags"], "model": counted[0] / counted[1], "error": error,
        "taken": "lags" if counted[1] < counted[0] else "patches",
        "peaks": {name: peak_bytes(partial(_once, way), torch.device("cpu")) for name, way in ways.items()},
    }  # fmt: skip


def _once(way: Callable[[], Tensor]) -> None:
    way()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| examples x channels x pixels, kernel | patches ms | lags ms | times faster | the model's | taken | patches MB | lags MB | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        examples, channels, pixels, kernel, groups = r["shape"]
        name = f"{examples} x {channels} x {pixels}^2, {kernel} x {kernel}" + (f", {groups} groups" if groups > 1 else "")
        lines.append(
            f"| {name} | {r['patches']:.2f} | {r['lags']:.2f} | {r['faster']:.2f} | {r['model']:.2f} | {r['taken']} | "
            f"{r['peaks']['patches'] / 1e6:.1f} | {r['peaks']['lags'] / 1e6:.1f} | {r['error']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "conv_factors.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(shape, options.rounds) for shape in SHAPES]
    head = f"float32, {options.rounds} rounds; {platform.machine()} CPU, {options.threads} threads, torch {torch.__version__}"
    text = table(rows)
    wrong = [r for r in rows if (r["taken"] == "lags") != (r["faster"] > 1)]
    loss = max((max(r["faster"], 1 / r["faster"]) for r in wrong), default=1.0)
    read = f"The model takes the slower way for {len(wrong)} of {len(rows)} shapes" + (f", at most {loss:.2f} times as slow" if wrong else "")
    read += ". CPU milliseconds; MB with the result."
    print(head, text, read, sep="\n\n")
    command = " ".join(["python benchmarks/conv_factors.py", *sys.argv[1:]])
    options.out.write_text(
        "# The input factor of a convolution by patches and by lags\n\nWritten by `benchmarks/conv_factors.py`, whose head says what is measured."
        f"\n\n```\n{command}\n```\n\n{head}\n\n{text}\n\n{read}\n"
    )


if __name__ == "__main__":
    main()
