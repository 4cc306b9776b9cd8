"""Grids and codes: cases worked by hand, then an oracle in float64."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UserError
from compress.quantize.scheme import Scheme, fake_quantize, make_grid, to_codes

BF16, FP32 = torch.bfloat16, torch.float32


def test_asymmetric_worked_by_hand() -> None:
    # Two groups of two columns, 2 bits: codes 0..3.
    # Group 1: -1 and 2: scale 1, zero 1, codes 0 and 3. Group 2: 0.5 and 1.5: the range holds 0, so
    # scale 0.5, zero 0, codes 1 and 3.
    q = to_codes(
        W := torch.tensor([[-1.0, 2.0, 0.5, 1.5]]), make_grid(W, s := Scheme(2, 2), FP32), s
    )
    assert q.codes.tolist() == [[0, 3, 1, 3]]
    assert q.scale.tolist() == [[1.0, 0.5]]
    assert q.zero is not None
    assert q.zero.tolist() == [[1, 0]]
    assert q.dequantize(FP32).tolist() == [[-1.0, 2.0, 0.5, 1.5]]


def test_symmetric_worked_by_hand() -> None:
    # absmax 3 over 2 bits: scale 2*3/3 = 2, centre code 2: values -4 -2 0 2; 3 is clipped to 2.
    scheme = Scheme(2, 2, symmetric=True)
    W = torch.tensor([[-1.9, 3.0]])
    q = to_codes(W, make_grid(W, scheme, FP32), scheme)
    assert q.codes.tolist() == [[1, 3]]
    assert q.dequantize(FP32).tolist() == [[-2.0, 2.0]]


def test_bound_narrows_the_range() -> None:
    W = torch.tensor([[-1.0, 4.0]])
    grid = make_grid(W, Scheme(2, 2), FP32, bound=torch.tensor([[2.0]]))
    assert grid.scale.tolist() == [[1.0]]
    assert grid.zero is not None
    assert grid.zero.tolist() == [[1]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, "channel"])
def test_against_float64(bits: int, symmetric: bool, group_size: int | str) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    W = torch.randn(5, 96, generator=torch.Generator().manual_seed(bits)) * 0.3
    q = to_codes(W, make_grid(W, scheme, BF16), scheme)
    columns = scheme.columns_per_group(96)
    for row in range(5):
        for g in range(96 // columns):
            w = W[row, g * columns : (g + 1) * columns].double()
            low, high = min(w.min().item(), 0.0), max(w.max().item(), 0.0)
            span = 2 * max(-low, high) if symmetric else high - low
            scale = float(torch.tensor(span / (2**bits - 1)).to(BF16))
            assert float(q.scale[row, g]) == pytest.approx(scale, rel=2**-8)
            scale = float(q.scale[row, g])
            zero = 2 ** (bits - 1) if symmetric else round(-low / scale)
            values = (torch.arange(2**bits).double() - zero) * scale
            nearest = (w.unsqueeze(1) - values).abs().min(1).values
            got = q.dequantize(torch.float64)[row, g * columns : (g + 1) * columns]
            assert (got - w).abs().sub(nearest).max() < 1e-6


def test_fake_quantize_equals_codes_and_back() -> None:
    scheme = Scheme(3, 32)
    W = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    grid = make_grid(W, scheme, BF16)
    assert torch.equal(fake_quantize(W, grid, scheme), to_codes(W, grid, scheme).dequantize(FP32))


def test_zero_group_stays_zero() -> None:
    scheme = Scheme(4, 2)
    W = torch.tensor([[0.0, 0.0, 1.0, -1.0]])
    assert to_codes(W, make_grid(W, scheme, BF16), scheme).dequantize(FP32)[0, :2].tolist() == [
        0,
        0,
    ]


def test_tiny_groups_keep_a_scale_in_float16() -> None:
    scheme = Scheme(4, 32)
    W = 1e-5 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    error = to_codes(W, make_grid(W, scheme, torch.float16), scheme).dequantize(FP32) - W
    # The smallest normal scale is coarser than the group needs, but half a step of it is the bound.
    assert error.abs().max() <= torch.finfo(torch.float16).tiny / 2 * 1.01


def test_bits_per_weight_counts_scales_and_zeros() -> None:
    W = torch.randn(4, 128)
    scheme = Scheme(4, 64)
    assert to_codes(W, make_grid(W, scheme, BF16), scheme).bits_per_weight == 4 + (16 + 4) / 64


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": "row"}]
)
def test_wrong_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="choose"):
        Scheme(**wrong)  # type: ignore[arg-type]


def test_group_size_is_settled_on_the_shapes() -> None:
    assert Scheme().resolve({"a": (8, 256), "b": (8, 384)}).group_size == 128
    assert Scheme().resolve({"a": (8, 256), "b": (8, 576)}).group_size == 64
    with pytest.raises(UserError, match="no group size"):
        Scheme().resolve({"a": (8, 100)})
    with pytest.raises(UserError, match="100 inputs of a"):
        Scheme(group_size=64).resolve({"a": (8, 100)})
