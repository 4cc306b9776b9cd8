"""The 8-bit kernels against their references, on awkward shapes with fresh data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.kernels import int4_cpu, int8_cpu, w8a8
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, make_grid, to_codes

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = [(16, 32), (48, 96), (3, 7), (192, 576), (65, 1537)]
CALM = [InputScheme(), InputScheme(per="tensor")]
OUTLIERS = [InputScheme(outliers="dynamic"), InputScheme(outliers="static")]

needs_avx512 = pytest.mark.skipif(
    not w8a8.cpu_runs(), reason="torch's integer matmul is slow or wrong on this CPU"
)


def quantized(
    shape: tuple[int, int], inputs: InputScheme | None, group_size: str = "channel"
) -> QTensor:
    scheme = Scheme(8, group_size, True, inputs=inputs)
    W = torch.randn(shape)
    return replace(to_codes(W, make_grid(W, scheme, BF16), scheme), inputs=inputs)


@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (3, 64), (192, 576), (65, 1536)])
@pytest.mark.parametrize("group_size", ["channel", "tensor"])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_weights_alone(shape: tuple[int, int], group_size: str, rows: int) -> None:
    q = quantized(shape, None, group_size)
    assert int8_cpu.supports(q, CPU, BF16)
    x = torch.randn(2, rows, shape[1]).to(BF16)
    y, expected = int8_cpu.Int8Weight.pack(q).matmul(x), int8_cpu.reference(x, q)
    assert (y.shape, y.dtype) == (expected.shape, BF16)
    assert ((y.float() - expected).norm() / expected.norm()) < 5e-3


@needs_avx512
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs", CALM + OUTLIERS, ids=lambda i: i.name)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_rounded_inputs(shape: tuple[int, int], inputs: InputScheme, rows: int) -> None:
    """With outliers in two columns, of which one token has most: without the split the error is plain."""
    q = quantized(shape, inputs)
    x = torch.randn(2, rows, shape[1])
    columns = torch.tensor([1, shape[1] - 2])
    if inputs in OUTLIERS:
        x[..., columns] *= 100
        x[0, 0, columns] = 900.0
    x = x.to(BF16)
    if inputs.static:
        q = replace(q, input_scale=torch.tensor(3 / 127))
    if inputs.outliers == "static":
        q = replace(q, columns=columns, kept=torch.randn(shape[0], 2).to(BF16))
    assert w8a8.supports(q, CPU, BF16)
    y, expected = w8a8.W8A8Weight.pack(q, CPU).matmul(x), w8a8.reference(x, q)
    assert (y.shape, y.dtype) == (expected.shape, BF16)
    # One rounding of the sum to bf16; the outliers make it large, so the rest is looked at alone below.
    assert ((y.float() - expected).norm() / expected.norm()) < 6e-3
    if inputs in OUTLIERS:
        calm = x.index_fill(-1, columns, 0)
        part = w8a8.W8A8Weight.pack(q, CPU).matmul(calm).float()
        wanted = w8a8.reference(calm, q)
        assert ((part - wanted).norm() / wanted.norm()) < 6e-3


@needs_avx512
def test_a_call_without_outliers_keeps_no_column() -> None:
    q = quantized((48, 96), InputScheme(outliers="dynamic"))
    plain = replace(q, inputs=InputScheme())
    x = torch.randn(3, 96).clamp(-5, 5).to(BF16)
    y = [w8a8.W8A8Weight.pack(weight, CPU).matmul(x) for weight in (q, plain)]
    assert torch.equal(*y)


@needs_avx512
def test_small_numbers_of_a_column_with_an_outlier_count_once() -> None:
    """One token has 80 in a column, the others about 3: what they have there is theirs alone."""
    q = quantized((48, 96), InputScheme(outliers="dynamic"))
    x = torch.randn(9, 96).clamp(-1, 1)
    x[:, 7], x[0, 7] = 3.0, 80.0
    y = w8a8.W8A8Weight.pack(q, CPU).matmul(x.to(BF16)).float()[1:]
    expected = w8a8.reference(x.to(BF16), q)[1:]
    assert ((y - expected).norm() / expected.norm()) < 6e-3


@needs_avx512
def test_no_column_is_kept_where_none_stood_out() -> None:
    q = quantized((48, 96), InputScheme(outliers="static"))
    none = replace(q, columns=torch.empty(0, dtype=torch.int64), kept=torch.empty(48, 0))
    x = torch.randn(3, 96).to(BF16)
    expected = w8a8.reference(x, none)
    y = w8a8.W8A8Weight.pack(none, CPU).matmul(x)
    assert ((y.float() - expected).norm() / expected.norm()) < 6e-3


def test_zeros_give_zeros() -> None:
    q = quantized((48, 96), InputScheme())
    y = w8a8.W8A8Weight.pack(q, CPU).matmul(torch.zeros(2, 96, dtype=BF16))
    assert torch.equal(y, torch.zeros(2, 48, dtype=BF16))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(8, 32, True),
        Scheme(8, "channel", False),
        Scheme(4, "channel", True),
        Scheme(8, "channel", True, "float"),
        Scheme(8, "channel", True, "float", InputScheme("float")),
        Scheme(8, "block", True, "float", InputScheme("float", "group")),
        # As many scales as rows, but of blocks.
        Scheme(8, "block", True),
        Scheme(4, 32, True, "float"),
    ],
    ids=lambda scheme: scheme.name,
)
def test_what_does_not_fit_is_declined(scheme: Scheme) -> None:
    W = torch.randn(128, 16384) if scheme.group_size == "block" else torch.randn(32, 64)
    q = replace(to_codes(W, make_grid(W, scheme, BF16), scheme), inputs=scheme.inputs)
    assert not int8_cpu.supports(q, CPU, BF16)
    assert not w8a8.supports(q, CPU, BF16)
    assert scheme.type == "int" or not int4_cpu.supports(q, CPU, BF16)


def test_other_dtypes_are_declined() -> None:
    q = quantized((32, 64), None)
    assert int8_cpu.supports(q, CPU, BF16)
    assert not int8_cpu.supports(q, CPU, torch.float32)
    assert not int8_cpu.supports(quantized((32, 63), None), CPU, BF16)
    assert not w8a8.supports(replace(q, inputs=InputScheme()), CPU, torch.float16)
