"""The kernels for packed weights, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(
    ("capability", "arguments", "most"),
    [
        (90, "w4-g128 1 28672 4096 norm,gated", 2.6),
        (90, "w3-g128 1 28672 4096 gated", 4.1),
        (90, "w4-g64-asym 8 4096 4096", 6.0),
        (89, "fp8-block+group 64 4096 4096 norm", 12.0),
        (80, "w4-g128 64 4096 4096", 12.0),
    ],
)
def test_kernels_compile_for_gpus(capability: int, arguments: str, most: float) -> None:
    """The interpreter accepts what the compiler does not; this needs no GPU. A weight has few instructions
    only as long as none is moved between threads, which the compiler is free to do."""
    if capability == 90 and torch.cuda.is_available():
        pytest.skip("the other tests compile here")
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_linear.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability), *arguments.split()],
        env=plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    product = found["linear_kernel"]
    # What a program may have on a GPU for graphics.
    assert all(line["shared"] <= 99 * 1024 and not line["stack"] for line in found.values())
    assert product["copied 16 bytes at a time"] > 0
    assert product["instructions a weight"] < most
    assert ("prepare_kernel" in found) == ("group" in arguments)
