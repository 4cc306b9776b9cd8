"""The parts of the kernel benchmark that need no GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from compress.quantize.scheme import make_grid, to_codes
from eval.benchmarks import kernel_speed


def test_shapes_of_an_8b_model() -> None:
    shapes = [kernel_speed.shape_of("llama-3.1-8b", name) for name in kernel_speed.LINEARS]
    assert shapes == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]


@pytest.mark.parametrize("name", kernel_speed.FORMATS)
def test_rows_by_rows_gives_the_same_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = kernel_speed.FORMATS[name]
    W = torch.randn(48, 256).bfloat16()
    monkeypatch.setattr(kernel_speed, "ROWS_AT_ONCE", 20)
    found = kernel_speed.quantized(W, scheme)
    whole = to_codes(W.float(), make_grid(W.float(), scheme, W.dtype), scheme)
    assert torch.equal(found.dequantize(torch.float32), whole.dequantize(torch.float32))
    assert found.inputs == scheme.inputs


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_speed"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="for a CUDA device"):
        kernel_speed.main()
