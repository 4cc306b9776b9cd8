"""Packed linears on a real device: the compiled kernels, captured graphs, the same result twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.kernels import packed_linear, tuning
from compress.kernels.fusion import PLAIN, Fusion, around
from compress.kernels.packed_linear import TritonWeight, reference
from compress.kernels.tuning import Config, Table
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, make_grid, to_codes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FORMATS = {
    "w4-g128": Scheme(4, 128, True),
    "w4-g64-asym": Scheme(4, 64),
    "w4-g32-asym": Scheme(4, 32),
    "w4-channel-asym": Scheme(4, "channel"),
    "w3-g128": Scheme(3, 128, True),
    "w3-g64-asym": Scheme(3, 64),
    "w2-g64": Scheme(2, 64, True),
    "w8-channel": Scheme(8, "channel", True),
    "w8-g128-asym": Scheme(8, 128),
    "fp8-channel": Scheme(8, "channel", True, "float"),
    "fp8-block": Scheme(8, "block", True, "float"),
    "fp8-channel+token": Scheme(8, "channel", True, "float", InputScheme("float")),
    "fp8-block+group": Scheme(8, "block", True, "float", InputScheme("float", "group")),
    "w8-channel+int8-token": Scheme(8, "channel", True, inputs=InputScheme()),
}
# Even ones; and rows that fill no program, with inputs that fill no step of all slices.
SHAPES = [((4096, 4096), torch.bfloat16), ((1000, 2944), torch.float16)]


def quantized(name: str, shape: tuple[int, int], dtype: torch.dtype) -> QTensor:
    scheme = FORMATS[name]
    W = torch.randn(shape, device=CUDA) * shape[1] ** -0.5
    return replace(to_codes(W, make_grid(W, scheme, dtype), scheme), inputs=scheme.inputs)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_every_format(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = quantized(name, shape, dtype)
    assert packed_linear.supports(q, CUDA, dtype)
    weight = TritonWeight.pack(q, CUDA)
    assert torch.equal(weight.dequantize(dtype), q.dequantize(dtype))
    for tokens in (1, 3, 16, 33, 64, 100):
        x = torch.randn(tokens, shape[1], device=CUDA, dtype=dtype)
        expected = reference(x, q)
        found = weight.matmul(x)
        # The dense product rounds each weight, and its inputs once more.
        assert difference(found, expected) < 4e-3 * (2 if tokens > 64 else 1)
        assert torch.equal(weight.matmul(x), found)


@pytest.mark.parametrize("name", ["w4-g128", "w4-g64-asym", "w3-g128", "fp8-channel", "w16"])
@pytest.mark.parametrize(
    "config",
    [
        Config("thin", 16, 4, 4),
        Config("thin", 64, 8, 3),
        Config("thin", 32, 4, 1, 4),
        Config("wide", 64, 4, 3),
        Config("wide", 128, 4, 2, 2),
    ],
    ids=str,
)
def test_what_surrounds_the_product(name: str, config: Config) -> None:
    torch.manual_seed(0)
    N, K = 2048, 4096
    W = (torch.randn(N, K, device=CUDA) * K**-0.5).bfloat16()
    if name == "w16":
        weight, exact = TritonWeight.dense(W), W.float()
    else:
        scheme = FORMATS[name]
        q = to_codes(W.float(), make_grid(W.float(), scheme, torch.bfloat16), scheme)
        weight, exact = TritonWeight.pack(q, CUDA), q.dequantize(torch.float32)
    norm = torch.rand(K, device=CUDA).bfloat16() + 0.5
    bias = torch.randn(N, device=CUDA).bfloat16()
    for tokens in (1, 2, 5, 31):
        if not tuning.fits(weight.key(tokens, torch.bfloat16), config):
            continue
        x = torch.randn(tokens, K, device=CUDA).bfloat16()
        for gated in (False, True):
            residual = torch.randn(tokens, N // 2 if gated else N, device=CUDA).bfloat16()
            fusion = Fusion(norm, 1e-5, bias, gated)
            wide = Fusion(norm.float(), 1e-5, bias.float(), gated)
            expected = around(lambda x: x @ exact.T, x.float(), wide, residual.float())
            found = weight.fused(x, fusion, residual, config)
            assert difference(found, expected) < 8e-3
            assert torch.equal(weight.fused(x, fusion, residual, config), found)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 128])
def test_captured_and_replayed(name: str, tokens: int) -> None:
    """The graph reads what lies in its inputs when it is replayed, bit for bit as without it."""
    torch.manual_seed(0)
    q = quantized(name, (2048, 2048), torch.bfloat16)
    weight = TritonWeight.pack(q, CUDA)
    fusion = Fusion(torch.rand(2048, device=CUDA).bfloat16() + 0.5, 1e-5, gated=True)
    x = torch.randn(tokens, 2048, device=CUDA).bfloat16()
    residual = torch.randn(tokens, 1024, device=CUDA).bfloat16()
    weight.fused(x, fusion, residual)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = weight.fused(x, fusion, residual)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, weight.fused(x, fusion, residual))


def test_tuning_keeps_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized("w4-g128", (4096, 4096), torch.bfloat16)
    weight = TritonWeight.pack(q, CUDA)
    monkeypatch.setitem(tuning.AXES, "thin", {"rows": (16, 32), "stages": (2, 3)})
    table = Table(tmp_path / "configs.json")
    times = packed_linear.tune(weight, 1, torch.bfloat16, table)
    assert 2 <= len(times) <= 5
    best = min(times, key=lambda config: times[config])
    assert Table.load(tmp_path / "configs.json").found == {weight.key(1, torch.bfloat16).text: best}
    # A weight is not read faster than 20 TB/s.
    assert min(times.values()) > 1e6 * weight.nbytes / 20e12


def test_packing_holds_one_linear_twice_at_most() -> None:
    q = quantized("w4-g128", (16384, 8192), torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight = TritonWeight.pack(q, CUDA)
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes + 16 * 2**27
    x = torch.randn(1, 8192, device=CUDA).bfloat16()
    assert difference(weight.fused(x, PLAIN), reference(x, q)) < 4e-3
