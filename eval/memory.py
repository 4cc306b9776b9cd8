"""Peak memory of this process: resident bytes on the host, allocated bytes on a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
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
    # A process that has not used the GPU yet has no peak there, and the call would fail.
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    if not os.access(CLEAR, os.W_OK):
        return False
    CLEAR.write_text(RESET_PEAK)
    return True


def rss() -> int:
    """Resident bytes now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Peak resident bytes since ``reset_peak`` (or since the start, see there)."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_cuda() -> int | None:
    """Peak bytes allocated by torch over all CUDA devices, None without one."""
    devices = range(torch.cuda.device_count())
    return sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None
