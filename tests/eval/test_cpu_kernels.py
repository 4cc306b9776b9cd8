"""The benchmark of the CPU's kernels, on a small weight."""

from __future__ import annotations

import pytest
import torch

from compress.kernels import cpu_library
from eval.benchmarks import cpu_kernels, timing

pytestmark = pytest.mark.skipif(
    not cpu_library.available(),
    reason="needs a CPU with AVX-512 and its bf16 instructions, and a C++ compiler",
)


def test_a_line_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "BYTES", 2**20)
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing, "SECONDS", 1e-4)
    with torch.inference_mode():
        found = cpu_kernels.candidates(64, 128, 2)
        # 4 bits, and a scale of 16 and a zero of 8 for each 64.
        assert found["int4-avx512"].nbytes == 64 * 128 // 2 + 64 * 2 * 3
        assert found["torch bf16"].nbytes == 64 * 128 * 2
        row = cpu_kernels.row("64x128", 2, found)
    assert row["share"]["read"] == 1
    assert all(len(times) == 3 for times in row["rounds"].values())
    header, _, line = cpu_kernels.table([row]).splitlines()
    assert header.count("us") == len(found) - 1
    assert line.startswith("| 64x128")


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels.CpuWeight, "matmul", lambda weight, x: x.new_ones(2, 64))
    with pytest.raises(RuntimeError, match=r"int2-avx512 is .* off"):
        cpu_kernels.candidates(64, 128, 2)


def test_what_memory_gives_reads_every_byte() -> None:
    tensor = torch.zeros(2**20, dtype=torch.int64)
    tensor[::1000] = 1
    assert torch.ops.compress.read(tensor) == len(tensor[::1000])
