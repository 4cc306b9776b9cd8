"""The packed int4 kernel against its reference, on awkward shapes with fresh data."""

from __future__ import annotations

import pytest
import torch

from compress.kernels import int4_cpu
from compress.quantize.scheme import Scheme, make_grid, to_codes

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [(16, 32, 32), (48, 96, 32), (192, 576, 64), (64, 1536, 512), (32, 192, "channel")],
)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_against_the_reference(
    bits: int,
    symmetric: bool,
    out_features: int,
    in_features: int,
    group_size: int | str,
    rows: int,
) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    W = torch.randn(out_features, in_features)
    q = to_codes(W, make_grid(W, scheme, BF16), scheme)
    assert int4_cpu.supports(q, CPU, BF16)
    x = torch.randn(2, rows, in_features).to(BF16)
    y = int4_cpu.Int4Weight.pack(q).matmul(x)
    expected = int4_cpu.reference(x, q)
    assert y.shape == expected.shape
    assert y.dtype == BF16
    # One bf16 rounding of the output, one of the offset.
    assert ((y.float() - expected).norm() / expected.norm()) < 8e-3


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype"),
    [
        (Scheme(8, 32), (32, 64), BF16),
        (Scheme(4, 16), (32, 64), BF16),
        (Scheme(4, 32), (20, 64), BF16),
        (Scheme(4, 32), (32, 64), torch.float32),
    ],
    ids=["8 bits", "groups of 16", "20 rows", "float32"],
)
def test_what_does_not_fit_is_declined(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = torch.randn(shape)
    assert not int4_cpu.supports(to_codes(W, make_grid(W, scheme, BF16), scheme), CPU, dtype)
