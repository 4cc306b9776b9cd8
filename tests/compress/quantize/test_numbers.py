"""Codes and what they stand for, against torch's own float8 and a table of e2m1 by hand."""

from __future__ import annotations

import pytest
import torch

from compress.quantize.numbers import decode_float, decode_scale, encode_float, round_float


def test_e2m1_rounds_to_nearest_and_ties_to_even() -> None:
    x = torch.tensor([0.0, 0.2, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 6.0, 99.0])
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0])
    assert torch.equal(decode_float(encode_float(x, 4), 4), wanted)
    assert torch.equal(decode_float(encode_float(-x, 4), 4), -wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_survives(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)
    values = decode_float(codes, bits)
    finite = values.isfinite()
    assert finite.sum() == (16 if bits == 4 else 254)
    assert torch.equal(encode_float(values[finite], bits), codes[finite])


def test_e4m3_saturates() -> None:
    x = torch.tensor([447.0, 460.0, 1e9, -1e9, torch.inf])
    found = decode_float(encode_float(x, 8), 8)
    assert torch.equal(found, torch.tensor([448.0, 448.0, 448.0, -448.0, 448.0]))


def test_scales_of_powers_of_two() -> None:
    found = decode_scale(torch.tensor([0, 1, 126, 127, 128, 254], dtype=torch.uint8))
    assert found.tolist() == [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127]


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_encoding_and_decoding(bits: int) -> None:
    x = torch.randn(1000) * 5
    values = decode_float(torch.arange(2**bits, dtype=torch.uint8), bits)
    values = values[values.isfinite()]
    nearest = (x.unsqueeze(1) - values).abs().amin(1)
    found = round_float(x, bits)
    assert torch.equal(found, decode_float(encode_float(x, bits), bits))
    assert torch.allclose((found - x).abs(), nearest)
    assert round_float(torch.tensor([-0.1]), 4).signbit().item()
