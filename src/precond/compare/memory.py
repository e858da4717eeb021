"""The peak number of bytes that tensors hold, measured the same way for every contender."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes held at once by tensors that `work` allocates.

    On CUDA this is the allocator's own record. On the CPU it is read from the allocations and
    releases that torch's profiler sees, temporaries inside operators included; memory that a
    library allocates for itself (LAPACK workspace, Python objects) is not seen.
    """
    if device.type == "cuda":
        return _cuda_peak(work, device)
    return _cpu_peak(work)


def _cuda_peak(work: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(work: Callable[[], None]) -> int:
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _native_stderr_silenced():
        recorder.start()
    try:
        work()
    finally:
        with _native_stderr_silenced():
            recorder.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorder.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """Hide what the profiler's C++ side writes to file descriptor 2 when it starts and stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
