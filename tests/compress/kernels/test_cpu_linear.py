"""The C++ kernels for linears against float32, on awkward shapes with several groups and fresh data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels import cpu_library
from compress.kernels.cpu_linear import CpuWeight, name, reference, supports, supports_dense
from compress.kernels.fusion import Fusion, around
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, make_grid, to_codes

CPU, BF16 = torch.device("cpu"), torch.bfloat16
# One rounding of each output to bf16 and nothing else: half a step is at most 2^-8 of a value.
ROUNDING = 2**-8

pytestmark = pytest.mark.skipif(
    not cpu_library.available(),
    reason="needs a CPU with AVX-512 and its bf16 instructions, and a C++ compiler",
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def quantized(scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    W = torch.randn(shape)
    return replace(to_codes(W, make_grid(W, scheme, BF16), scheme), inputs=scheme.inputs)


def off(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


FORMATS = [
    *(Scheme(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (32, 64, "channel")
      for symmetric in (False, True)),
    Scheme(5, 32),
    Scheme(7, 32, symmetric=True),
    Scheme(8, "tensor", symmetric=True),
    Scheme(8, "block", symmetric=True),
    Scheme(8, "channel", symmetric=True, type="float"),
    Scheme(8, "tensor", symmetric=True, type="float"),
    Scheme(8, "block", symmetric=True, type="float"),
    Scheme(8, 32, symmetric=True, type="float"),
    Scheme(4, 32, symmetric=True, type="float"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", FORMATS, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(960, 576), (50, 192), (16, 32), (33, 160)])
def test_products(scheme: Scheme, shape: tuple[int, int]) -> None:
    if isinstance(scheme.group_size, int) and shape[1] % scheme.group_size:
        shape = (shape[0], 3 * scheme.group_size)
    q = quantized(scheme, shape)
    assert supports(q, CPU, BF16)
    weight = CpuWeight.pack(q)
    for tokens in (1, 2, 3, 7, 16, 40, 129):
        x = torch.randn(tokens, shape[1]).to(BF16)
        y = weight.matmul(x)
        assert (y.shape, y.dtype) == ((tokens, shape[0]), BF16)
        # Above a few tokens the weight is rounded to bf16 as well.
        bound = ROUNDING if x.numel() <= weight.few else 2 * ROUNDING
        assert off(y, reference(x, q)) < bound, tokens
    assert torch.equal(weight.dequantize(), q.dequantize(BF16))


def test_every_code_counts_as_what_it_stands_for() -> None:
    """Also the subnormals of e4m3, which a product with bf16 would take for nothing."""
    for kind, bits in (("int", 2), ("int", 3), ("int", 4), ("int", 8), ("float", 4), ("float", 8)):
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat(512 * 32 // 2**bits).view(512, 32)
        # Each column with each code: rows are shifted against each other.
        codes = torch.stack([row.roll(i) for i, row in enumerate(codes)])
        if (kind, bits) == ("float", 8):
            codes = torch.where(codes % 128 == 127, codes - 1, codes)
        q = QTensor(codes, torch.ones(512, 1, dtype=BF16), None, bits, kind)
        y = CpuWeight.pack(q).matmul(torch.eye(32, dtype=BF16))
        assert torch.equal(y.T.float(), q.dequantize(torch.float32)), (kind, bits)


@pytest.mark.parametrize("shape", [(960, 576), (50, 96), (3, 7), (19, 1000)])
def test_sixteen_bits_without_a_copy(shape: tuple[int, int]) -> None:
    W = torch.randn(shape).to(BF16)
    assert supports_dense(W)
    weight = CpuWeight.dense(W)
    assert weight.codes is W
    assert weight.nbytes == W.nbytes
    for tokens in (1, 2, 3, 7, 16, 40, 65):
        x = torch.randn(tokens, shape[1]).to(BF16)
        assert off(weight.matmul(x), x.float() @ W.float().T) < ROUNDING, tokens


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("fusion", range(16))
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("rows", [192, 80])
def test_what_surrounds_the_product(kind: str, fusion: int, tokens: int, rows: int) -> None:
    norm, bias, gated, added = (bool(fusion & bit) for bit in (1, 2, 4, 8))
    if kind == "bf16":
        W = torch.randn(rows, 96).to(BF16)
        weight = CpuWeight.dense(W)
    else:
        q = quantized(Scheme(int(kind[-1]), 32), (rows, 96))
        weight, W = CpuWeight.pack(q), q.dequantize(torch.float32)
    fused = Fusion(
        torch.rand(96).to(BF16) if norm else None,
        1e-5,
        torch.randn(rows).to(BF16) if bias else None,
        gated,
    )
    x = 3 * torch.randn(2, tokens, 96).to(BF16)
    residual = (
        100 * torch.randn(2, tokens, rows // 2 if gated else rows).to(BF16) if added else None
    )
    y = weight.fused(x, fused, residual)
    # The norm is rounded in steps in both; behind it one is exact.
    plain = replace(fused, norm=None, bias=None if fused.bias is None else fused.bias.float())
    if fused.norm is not None:
        x = around(lambda x: x, x, Fusion(fused.norm, fused.eps))
    expected = around(
        lambda x: x @ W.float().T, x.float(), plain, None if residual is None else residual.float()
    )
    assert (y.shape, y.dtype) == (expected.shape, BF16)
    # Step by step, where the kernel does not fuse, each step is rounded.
    steps = x.numel() > weight.few or (gated and rows == 80)
    assert off(y, expected) < (1e-2 if steps else ROUNDING)


@pytest.mark.parametrize("per", ["token", "tensor", "group"])
@pytest.mark.parametrize("norm", [False, True])
def test_inputs_in_eight_bits(per: str, norm: bool) -> None:
    scheme = Scheme(8, "channel", True, type="float", inputs=InputScheme("float", per))
    q = quantized(scheme, (48, 256))
    if per == "tensor":
        q = replace(q, input_scale=torch.tensor(3 / 448))
    assert supports(q, CPU, BF16)
    fusion = Fusion(torch.rand(256).to(BF16) if norm else None, 1e-5)
    x = torch.randn(3, 256).to(BF16)
    y = CpuWeight.pack(q).fused(x, fusion)
    expected = reference(around(lambda x: x, x, fusion), q)
    assert off(y, expected) < ROUNDING


def test_threads_do_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    weights = [CpuWeight.pack(quantized(Scheme(bits, 64), (3072, 576))) for bits in (2, 3, 4, 8)]
    weights.append(CpuWeight.dense(torch.randn(3072, 576).to(BF16)))
    x = torch.randn(3, 576).to(BF16)
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([weight.matmul(x) for weight in weights])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_view_is_an_input_as_any_other() -> None:
    weight = CpuWeight.pack(quantized(Scheme(4, 32), (64, 96)))
    x, rest = torch.randn(2, 5, 96).to(BF16), torch.randn(2, 5, 64).to(BF16)
    y = weight.fused(x[:, -1:], Fusion(), rest[:, -1:])
    assert torch.equal(y, weight.fused(x[:, -1:].contiguous(), Fusion(), rest[:, -1:].contiguous()))


def test_names_are_of_the_bits_in_memory() -> None:
    names = [
        name(quantized(scheme, (16, 32)))
        for scheme in (Scheme(3, 32), Scheme(6, 32), Scheme(8, "tensor", True, type="float"))
    ]
    assert names == ["int3-avx512", "int8-avx512", "fp8-avx512"]


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype"),
    [
        (Scheme(4, 16), (32, 64), BF16),
        (Scheme(4, "channel"), (32, 48), BF16),
        (Scheme(4, 32), (32, 64), torch.float32),
        (Scheme(4, 16, True, type="float"), (32, 64), BF16),
        (Scheme(8, "channel", True, inputs=InputScheme()), (32, 64), BF16),
        (Scheme(8, "channel", True, inputs=InputScheme(outliers="dynamic")), (32, 64), BF16),
    ],
    ids=["groups of 16", "48 columns", "float32", "nvfp4", "int8 inputs", "outliers"],
)
def test_what_does_not_fit_is_declined(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    assert not supports(quantized(scheme, shape), CPU, dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(1, 64, dtype=BF16)},
        {"x": torch.ones(1, 96)},
        {"residual": torch.ones(1, 32, dtype=BF16)},
        {"norm": torch.ones(95, dtype=BF16)},
        {"bias": torch.ones(8, dtype=BF16)},
        {"gated": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_sizes_are_refused(changes: dict[str, Any]) -> None:
    weight = CpuWeight.pack(quantized(Scheme(4, 32), (48, 96)))
    given: dict[str, Any] = {
        "x": torch.ones(1, 96, dtype=BF16), "codes": weight.codes, "scales": weight.scales,
        "zeros": weight.zeros, "format": 4, "group": 32, "rows": 48, "norm": None, "eps": 0.0,
        "bias": None, "gated": False, "residual": None,
    }  # fmt: skip
    torch.ops.compress.linear(**given)
    with pytest.raises(RuntimeError):
        torch.ops.compress.linear(**{**given, **changes})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_those_of_the_dequantized_weight(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 32, symmetric)
    W = torch.randn(50, 96, generator=torch.Generator().manual_seed(bits))
    weight = CpuWeight.pack(to_codes(W, make_grid(W, scheme, torch.bfloat16), scheme))
    index = torch.tensor([49, 0, 16, 16, 31])
    assert torch.equal(weight.rows(index), weight.dequantize()[index])
