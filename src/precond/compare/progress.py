"""How far a comparison is: a live bar on a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from precond.compare.run import Run


class Display:
    """What a comparison tells while it works; the base class says nothing."""

    def __enter__(self) -> Display:
        """Take over the terminal, if it needs to."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give it back."""

    def start(self, steps: int) -> None:
        """The whole comparison takes this many training steps."""

    def begin(self, what: str) -> None:
        """A piece of work begins."""

    def advance(self, loss: float) -> None:
        """One training step is done."""

    def finished(self, run: Run) -> None:
        """A full run is done."""


class Silent(Display):
    """Says nothing."""


class Lines(Display):
    """One plain line for every finished run: for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def finished(self, run: Run) -> None:
        """Print the run."""
        print(describe(run), file=self.stream, flush=True)


class Bar(Display):
    """A live progress bar by rich, with the lines of finished runs above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def start(self, steps: int) -> None:
        """Open the bar."""
        self.bar = self.progress.add_task("", total=steps, loss="")

    def begin(self, what: str) -> None:
        """Name the piece of work."""
        self.progress.update(self.bar, description=what)

    def advance(self, loss: float) -> None:
        """Move on by a step and show its loss."""
        self.progress.update(self.bar, advance=1, loss=f"{loss:.3g}")

    def finished(self, run: Run) -> None:
        """Print the run above the bar."""
        self.progress.console.print(describe(run), highlight=False)


def describe(run: Run) -> str:
    """One run in one line."""
    head = f"{run.task:12} {run.contender:16} seed {run.seed}  lr {run.lr:<8g}"
    if run.failure is not None:
        return f"{head} failed after {len(run.losses)} steps: {run.failure}"
    return f"{head} {len(run.losses)} steps in {sum(run.seconds):5.1f} s  test accuracy {100 * run.accuracies[-1]:.1f} %"


def choose(stream: TextIO | None = None) -> Display:
    """The bar where there is a terminal to draw on and rich to draw it, lines elsewhere."""
    stream = stream or sys.stderr
    if not stream.isatty():
        return Lines(stream)
    try:
        return Bar(stream)
    except ImportError:
        return Lines(stream)
