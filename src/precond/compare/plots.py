"""Two pictures: the training loss by step and by second, a panel for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from precond.compare.curves import Curve, resample, trailing_mean
from precond.compare.extras import need
from precond.compare.run import Run
from precond.compare.session import Results
from precond.compare.table import window

# Okabe and Ito's palette, which colour-blind readers can tell apart; the first two are the stock optimizers' greys.
_GREYS = {"sgd": "#000000", "adamw": "#7f7f7f"}
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]


def draw(results: Results, out: Path) -> list[Path]:
    """Write `loss_by_step.png` and `loss_by_second.png` into `out`; returns their paths."""
    need("matplotlib", package="matplotlib", purpose="to draw the pictures")
    return [
        _picture(results, out / "loss_by_step.png", by_second=False),
        _picture(results, out / "loss_by_second.png", by_second=True),
    ]


def _picture(results: Results, path: Path, *, by_second: bool) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in results.settings["tasks"] if any(_drawable(results, task, c) for c in results.settings["contenders"])]
    figure = Figure(figsize=(6.2 * max(1, len(tasks)), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=False):
        _panel(panel, results, task, by_second=by_second)
    legend = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 6), frameon=False)
    figure.savefig(path)
    return path


def _panel(panel: Any, results: Results, task: str, *, by_second: bool) -> None:
    for index, label in enumerate(results.settings["contenders"]):
        runs = _drawable(results, task, label)
        if not runs:
            continue
        x, curves = _curves(runs, window(results, task), by_second=by_second)
        style = {"color": _colour(results, index), "label": label}
        panel.plot(x, np.exp(np.log(curves).mean(axis=0)), linewidth=1.8, **style)
        panel.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    panel.set(title=task, yscale="log", xlabel="seconds of training" if by_second else "steps")
    panel.set_ylabel("training loss (mean over the last epoch)")
    if by_second:
        panel.set_xscale("log")
    panel.grid(alpha=0.25, which="major")
    panel.spines[["top", "right"]].set_visible(False)


def _curves(runs: list[Run], span: int, *, by_second: bool) -> tuple[Curve, Curve]:
    """The x axis and a smoothed curve per run, over the span that all runs cover."""
    smoothed = [trailing_mean(run.losses, span) for run in runs]
    if by_second:
        return resample(smoothed, [np.cumsum(run.seconds) for run in runs])
    length = min(len(curve) for curve in smoothed)
    rows = np.stack([np.maximum(curve[:length], 1e-12) for curve in smoothed])
    return np.arange(1, length + 1, dtype=np.float64), rows


def _drawable(results: Results, task: str, label: str) -> list[Run]:
    return [run for run in results.runs_of(task, label) if len(run.losses) > 1]


def _colour(results: Results, index: int) -> str:
    labels = results.settings["contenders"]
    coloured = [label for label in labels if label not in _GREYS]
    label = labels[index]
    return _GREYS[label] if label in _GREYS else _COLOURS[coloured.index(label) % len(_COLOURS)]
