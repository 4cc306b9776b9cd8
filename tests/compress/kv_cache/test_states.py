"""Quantized states: by hand, against a slow oracle, and what a store may do."""

from __future__ import annotations

import pytest
import torch

from compress.kv_cache.scheme import StateScheme
from compress.kv_cache.states import Packed, dequantize, quantize, rotation, static_scale

CHANNEL = StateScheme(bits=2, per="channel", group_size=4)


def test_keys_by_hand() -> None:
    """Four tokens of four channels: 2-bit integers of each channel by itself."""
    keys = torch.tensor([[0.0, 8, -1, 5], [1, 11, -1, 5], [2, 14, -1, 6.5], [3, 17, -1, 5]]).view(
        1, 1, 4, 4
    )
    packed = quantize(keys, CHANNEL)
    # Four codes share a byte, the first channel in its lowest bits.
    codes = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 0, 3], [3, 3, 0, 0]])
    byte = codes[:, 0] + 4 * codes[:, 1] + 16 * codes[:, 2] + 64 * codes[:, 3]
    assert packed.codes.flatten().tolist() == byte.tolist()
    assert packed.scale is not None
    assert packed.low is not None
    assert packed.scale.flatten().tolist() == [1, 3, 0, 0.5]
    assert packed.low.flatten().tolist() == [0, 8, -1, 5]
    assert torch.equal(dequantize(packed, CHANNEL), keys)


def test_bytes_hold_channels_a_width_apart() -> None:
    values = torch.arange(16.0).view(1, 1, 1, 16)
    packed = quantize(values, StateScheme(bits=4))
    assert packed.codes.flatten().tolist() == [low + 16 * (low + 8) for low in range(8)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("per", "size"), [("channel", 4), ("channel", 8), ("token", None), ("token", 8)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_against_a_slow_oracle(bits: int, per: str, size: int | None, symmetric: bool) -> None:
    """Every group by itself in float64, several groups along both axes."""
    torch.manual_seed(bits)
    scheme = StateScheme(bits=bits, per=per, group_size=size, symmetric=symmetric)
    states = torch.randn(2, 3, 16, 32) * torch.rand(32) * 5 + torch.randn(32)
    found = dequantize(quantize(states, scheme), scheme)
    expected = torch.empty_like(states, dtype=torch.float64)
    for batch in range(2):
        for head in range(3):
            x = states[batch, head].double()
            rows = x.T if per == "channel" else x
            out = torch.empty_like(rows)
            width = size or rows.shape[1]
            for i, row in enumerate(rows):
                for start in range(0, len(row), width):
                    group = row[start : start + width]
                    out[i, start : start + width] = _oracle(group, bits, symmetric)
            expected[batch, head] = out.T if per == "channel" else out
    # A value on the edge between two codes may fall on either side in float32.
    assert (found - expected).abs().gt(1e-4).double().mean() < 1e-3


def _oracle(group: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = (group.abs().max() / most).half().double()
        return (group / scale).round().clamp(-most, most) * scale
    low = group.min().half().double()
    scale = ((group.max() - low) / (2**bits - 1)).half().double()
    return ((group - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def test_rotation_preserves_products_and_spreads_outliers() -> None:
    torch.manual_seed(0)
    H = rotation(64, torch.device("cpu"))
    assert torch.allclose(H @ H.T, torch.eye(64), atol=1e-6)
    keys = torch.randn(1, 2, 128, 64)
    keys[..., 7] *= 30
    plain = StateScheme(bits=4)
    turned = StateScheme(bits=4, rotate=True)
    eight = StateScheme(bits=8, rotate=True)
    assert (dequantize(quantize(keys, eight), eight) - keys).abs().max() < 0.3
    errors = [
        (dequantize(quantize(keys, s), s) - keys).square().mean().item() for s in (plain, turned)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("per", ["tensor", "head"])
def test_floats_by_fixed_scales(per: str) -> None:
    torch.manual_seed(0)
    scheme = StateScheme("float", 8, per)
    states = torch.randn(2, 3, 5, 16)
    largest = states.abs().amax((0, 2, 3))
    scale = static_scale(largest).view(3, 1, 1) if per == "head" else static_scale(largest.max())
    packed = quantize(states, scheme, scale)
    assert packed.scale is None
    assert packed.codes.nbytes == states.numel()
    found = dequantize(packed, scheme, scale)
    # The largest becomes 448, which comes back; others keep three bits behind the first.
    assert found.abs().max() == pytest.approx(states.abs().max().item(), rel=1e-6)
    assert ((found - states).abs() <= states.abs() / 16 + scale * 2**-10).all()
    # Beyond the calibrated largest, the largest: never NaN.
    beyond = dequantize(quantize(100 * states, scheme, scale), scheme, scale)
    assert torch.isfinite(beyond).all()
    assert (beyond.abs() <= 448 * scale * 1.0001).all()


def test_appending_and_dropping_whole_groups() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 2, 16, 8)
    whole = quantize(states, CHANNEL)
    parts = quantize(states[:, :, :4], CHANNEL).append(quantize(states[:, :, 4:], CHANNEL))
    assert all(map(torch.equal, whole.tensors, parts.tensors))
    rest = whole.without(8)
    assert torch.equal(dequantize(rest, CHANNEL), dequantize(whole, CHANNEL)[:, :, 8:])
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in rest.tensors)
    swapped = whole.map(lambda part: part.flip(0))
    assert isinstance(swapped, Packed)
    assert torch.equal(dequantize(swapped, CHANNEL), dequantize(whole, CHANNEL).flip(0))


def test_a_group_of_equal_values_is_exact() -> None:
    states = torch.full((1, 1, 4, 4), -3.25)
    assert torch.equal(dequantize(quantize(states, CHANNEL), CHANNEL), states)
    zero = StateScheme(bits=8, symmetric=True)
    assert torch.equal(dequantize(quantize(0 * states, zero), zero), 0 * states)
