"""Read bandwidth of a device's memory: what a decode step is held against.

A step must read the weights and the cache, so its shortest time is their bytes over this bandwidth. It is
measured, not taken from a data sheet, by the plainest read there is: a sum over a buffer that no cache
holds, whose result is kept.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CACHES = Path("/sys/devices/system/cpu")
# Bytes to read: well beyond any cache of a GPU (50 MB on an H100); on a CPU several times its last level.
CUDA_BYTES, CPU_BYTES, TIMES_CACHE = 2**30, 2**28, 4
PASSES = 3
# Elements a program reads at once, reads in flight, warps: which is fastest depends on the GPU.
CONFIGURATIONS = (
    (2048, 4, 4),
    (4096, 4, 8),
    (4096, 8, 8),
    (8192, 4, 8),
    (2048, 8, 4),
    (1024, 8, 4),
)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second, the best of a few passes. Allocates the buffer, and frees it."""
    if device.type != "cuda":
        return _cpu()
    with torch.cuda.device(device):
        x = torch.ones(CUDA_BYTES // 4, dtype=torch.int32, device=device)
        if read_kernel(device) == "torch.sum":
            return x.nbytes / _seconds(functools.partial(torch.sum, x.view(torch.float32)))
        return x.nbytes / _seconds(functools.partial(triton_sum, x, *_fastest(device.index or 0)))


def read_kernel(device: torch.device) -> str:
    """What reads: ``triton`` on CUDA where it is installed, ``torch.sum`` elsewhere."""
    if device.type != "cuda":
        return "torch.sum"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch.sum"
    return "triton"


def _cpu() -> float:
    """With as many threads as torch has. The sum of float32 is one vector addition a load: on two cores of
    an EPYC it read 32 GB/s, as much as the maximum, the norm and the sum of int64, where a product with a
    matrix read 20 and the sum of int32, which converts first, 1."""
    x = torch.ones(max(CPU_BYTES, TIMES_CACHE * last_level_cache()) // 4)
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


@functools.cache
def last_level_cache() -> int:
    """Bytes of all caches of the highest level that the system tells of; 0 where it does not."""
    found: dict[int, dict[str, int]] = {}
    for index in CACHES.glob("cpu[0-9]*/cache/index*"):
        level, size, shared = (
            (index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
        )
        # By the processors that share it: each of them tells of the same one.
        found.setdefault(int(level), {})[shared] = 1024 * int(size.removesuffix("K"))
    return sum(found[max(found)].values()) if found else 0


def triton_sum(x: Tensor, block: int, loads: int, warps: int) -> Tensor:
    """Sums of the stretches of ``block`` x ``loads`` elements of x (int32), which they must divide."""
    from eval.read_kernel import sum_kernel

    stretches, rest = divmod(x.numel(), block * loads)
    assert not rest, (x.numel(), block, loads)
    sums = torch.empty(stretches, dtype=torch.int32, device=x.device)
    sum_kernel[(stretches,)](x, sums, BLOCK=block, LOADS=loads, num_warps=warps)
    return sums


@functools.cache
def _fastest(index: int) -> tuple[int, int, int]:
    x = torch.ones(CUDA_BYTES // 4, dtype=torch.int32, device=torch.device("cuda", index))
    return min(CONFIGURATIONS, key=lambda c: _seconds(functools.partial(triton_sum, x, *c)))


def _seconds(read: Callable[[], Tensor]) -> float:
    """Seconds a call on CUDA, by events around several: the best of a few passes after one that compiles."""
    read()
    seconds = []
    for _ in range(PASSES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            read()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 5e3)
    return min(seconds)
