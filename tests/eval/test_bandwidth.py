"""The read bandwidth: a sane figure, and a kernel that reads everything once."""

from __future__ import annotations

import sys

import pytest
import torch

from eval.bandwidth import CUDA_BYTES, last_level_cache, read_bandwidth, read_kernel, triton_sum

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_cpu_reads_at_a_sane_speed() -> None:
    cpu = torch.device("cpu")
    assert 5e8 < read_bandwidth(cpu) < 2e12
    assert read_kernel(cpu) == "torch.sum"


def test_the_last_level_cache_is_told_in_bytes() -> None:
    assert last_level_cache() == 0 or 2**18 <= last_level_cache() <= 2**33


@pytest.mark.parametrize(("block", "loads"), [(64, 4), (128, 1)])
def test_the_kernel_sums_every_element_once(block: int, loads: int) -> None:
    x = torch.randint(-(2**20), 2**20, (7 * block * loads,), dtype=torch.int32)
    found = triton_sum(x.to(DEVICE), block, loads, 4).cpu()
    assert torch.equal(found.long(), x.view(7, -1).long().sum(1))


@pytest.mark.gpu
def test_the_kernel_reads_as_fast_as_torch() -> None:
    assert read_kernel(DEVICE) == "triton"
    x = torch.ones(CUDA_BYTES // 4, device=DEVICE)
    x.sum()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        x.sum()
    end.record()
    end.synchronize()
    torchs = 20 * x.nbytes / (start.elapsed_time(end) / 1e3)
    assert read_bandwidth(DEVICE) > 0.95 * torchs


def test_torch_alone_reads_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # An import of a name that stands for None fails.
    monkeypatch.setitem(sys.modules, "triton", None)
    assert read_kernel(torch.device("cuda")) == "torch.sum"
