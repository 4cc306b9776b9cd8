"""Peak memory of this process: resident bytes on the host, allocated bytes on a CUDA device.

``tree``: with the processes that it started, added up (pages they share count in each).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

PROC = Path("/proc")
# Kernel interface: writing 5 resets the peak resident size of the process (man
# proc_pid_clear_refs).
RESET_PEAK = "5"


def give_back() -> None:
    """Let the system have what no object holds any more."""
    gc.collect()
    trim()


def trim() -> None:
    """Let the system have the memory that was freed: glibc keeps it, and a later peak would come on top."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> bool:
    """Start a new peak measurement from what is really in use.

    What earlier work freed goes back to the system first. False where the system cannot reset: the peak
    then counts from the start of the process.
    """
    give_back()
    return mark_peak()


def mark_peak(*, tree: bool = False) -> bool:
    """``reset_peak`` that leaves freed memory where it is, so that what runs next is not slowed down."""
    # A process that has not used the GPU yet has no peak there, and the call would fail.
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    # A list: all of them, also after one that cannot be reset.
    return all([_clear(process) for process in _processes(tree)])


def _clear(process: psutil.Process) -> bool:
    file = PROC / str(process.pid) / "clear_refs"
    try:
        file.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _processes(tree: bool) -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *(own.children(recursive=True) if tree else [])]


def rss(*, tree: bool = False) -> int:
    """Resident bytes now."""
    return _sum(_resident, tree)


def peak_rss(*, tree: bool = False) -> int:
    """Peak resident bytes since ``reset_peak`` (or since the start, see there)."""
    return _sum(_peak, tree)


def _sum(ask: Callable[[psutil.Process], int], tree: bool) -> int:
    """Of the processes that are still there when they are asked."""
    found = 0
    for process in _processes(tree):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            found += ask(process)
    return found


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _peak(process: psutil.Process) -> int:
    if PROC.exists():
        for line in (PROC / str(process.pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_cuda() -> int | None:
    """Peak bytes allocated by torch over all CUDA devices, None without one."""
    devices = range(torch.cuda.device_count())
    return sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None


def allocated_cuda() -> int | None:
    """Bytes that torch holds on all CUDA devices now, None without one."""
    devices = range(torch.cuda.device_count())
    return sum(map(torch.cuda.memory_allocated, devices)) if devices else None
