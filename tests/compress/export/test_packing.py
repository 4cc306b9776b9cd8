"""The dense bit stream: by hand, round trip, and against compressed-tensors' own routines."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from compress.export.packing import pack_rows, packed_width, unpack_rows


def test_by_hand() -> None:
    # 4 bits: element 0 in the lowest nibble. 3 bits: element 10 straddles words 0 and 1.
    assert pack_rows(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x321]]
    row = torch.zeros(1, 11, dtype=torch.uint8)
    row[0, 10] = 0b111
    assert pack_rows(row, 3).tolist() == [[-(2**31) + 2**30, 1]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 31, 32, 72, 129])
def test_round_trip_and_the_other_library(bits: int, n: int) -> None:
    generator = torch.Generator().manual_seed(bits * n)
    codes = torch.randint(2**bits, (5, n), generator=generator).to(torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, packed_width(n, bits))
    assert torch.equal(unpack_rows(packed, bits, n), codes)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((5, n))), signed)
