"""One process-wide guard against re-entry, for all observers.

A nested pass fires every tensor hook on its way, those of another preconditioner on the same model too, and on an
accelerator it runs on the engine's own thread: so the guard is one flag of the process, not of a thread or an object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_depth = 0


def busy() -> bool:
    """True inside a pass that this library started itself: every hook of ours returns at once."""
    return _depth > 0


@contextlib.contextmanager
def own_pass() -> Iterator[None]:
    """Mark a forward or backward pass as ours."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
