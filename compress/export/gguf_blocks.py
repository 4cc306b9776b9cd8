"""How GGUF packs a row of a weight: blocks of 32 or 256 columns, each with its scale in float16.

Codes are packed as they were decided, never rounded again. d is the scale, q the stored code:

    type    columns  bytes  weight
    Q4_0         32     18  d (q - 8)
    Q4_1         32     20  d q + m
    Q5_0         32     22  d (q - 16)
    Q5_1         32     24  d q + m
    Q8_0         32     34  d q, q signed
    MXFP4        32     17  2^(e - 127) e2m1(q), e in e8m0
    Q2_K        256     84  d s q - dmin z, s and z in 4 bits for each 16 columns
    Q3_K        256    110  d (s - 32) (q - 4), s in 6 bits for each 16
    Q4_K        256    144  d s q - dmin z, s and z in 6 bits for each 32
    Q5_K        256    176  the same
    Q6_K        256    210  d s (q - 32), s in 8 bits for each 16

In the last five, scale and zero point of a whole number of blocks are held exactly by factors of one:
d = dmin = scale, s = 1, z = the zero point. In Q4_1 and Q5_1 m = -zero scale is rounded to float16, which
moves all weights of a group alike, by at most 2^-11 of |m|; codes, scale and zero point still read back as
they were.

Layouts from ggml (github.com/ggml-org/llama.cpp, ggml-common.h); tests hold them to the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHORT, LONG = 32, 256
# The factor one in the scales of a block: 8 of Q4_K and Q5_K in 6 bits, 16 of Q3_K in 6 bits, offset 32.
_ONES_3 = [0x11] * 8 + [0xAA] * 4


@dataclass(frozen=True)
class Block:
    """One type of block.

    columns; nbytes; bits: of a stored code; zero: whether it has a zero point (``MINIMUM``: a minimum)
    pack(codes, d, low) -> uint8 (..., nbytes): codes uint8 (..., columns), d float16 (...), low uint8 zero
        point or float16 minimum (...), None if there is none
    unpack(blocks) -> codes, d, low: the reverse; in types of 256 columns low is None where the factors of
        some block are not all one, and else the zero point, that of symmetric codes too
    """

    columns: int
    nbytes: int
    bits: int
    zero: bool
    pack: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


def _bytes(number: Tensor) -> Tensor:
    """float16 (...) -> uint8 (..., 2), the low byte first."""
    return number.contiguous().unsqueeze(-1).view(torch.uint8)


def _half(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.float16).squeeze(-1)


def _nibbles(codes: Tensor) -> Tensor:
    """The first half of the columns in the low halves of the bytes. (..., n) -> (..., n / 2)"""
    low, high = codes.chunk(2, dim=-1)
    return (low & 15) | (high & 15) << 4


def _from_nibbles(stored: Tensor) -> Tensor:
    return torch.cat([stored & 15, stored >> 4], dim=-1)


def _planes(parts: Tensor, bits: int) -> Tensor:
    """Parts of a row laid over each other, each so many bits higher. (..., parts, n) -> (..., n)"""
    shifts = torch.arange(parts.shape[-2], device=parts.device, dtype=torch.uint8) * bits
    shifted = parts << shifts.unsqueeze(-1)
    # No two of them have a bit in common.
    return shifted.sum(-2, dtype=torch.uint8)


def _from_planes(stored: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(8 // bits, device=stored.device, dtype=torch.uint8) * bits
    return (stored.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (2**bits - 1)


def _fifth(codes: Tensor) -> Tensor:
    """Bit 4 of 32 codes, in 4 bytes."""
    return _planes((codes >> 4).unflatten(-1, (4, 8)).transpose(-1, -2), 1)


def _from_fifth(stored: Tensor) -> Tensor:
    return _from_planes(stored, 1).transpose(-1, -2).flatten(-2) << 4


def _pack_4(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    lows = [] if low is None else [_bytes(low)]
    return torch.cat([_bytes(d), *lows, _nibbles(codes)], dim=-1)


def _pack_5(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    lows = [] if low is None else [_bytes(low)]
    return torch.cat([_bytes(d), *lows, _fifth(codes), _nibbles(codes)], dim=-1)


def _unpack_4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _from_nibbles(blocks[..., 2:]), _half(blocks[..., :2]), None


def _unpack_4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _from_nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _unpack_5_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = _from_nibbles(blocks[..., 6:]) | _from_fifth(blocks[..., 2:6])
    return codes, _half(blocks[..., :2]), None


def _unpack_5_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = _from_nibbles(blocks[..., 8:]) | _from_fifth(blocks[..., 4:8])
    return codes, _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _pack_8(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    # Flipping the top bit takes 128 off: an unsigned byte becomes the signed one.
    return torch.cat([_bytes(d), codes ^ 128], dim=-1)


def _unpack_8(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return blocks[..., 2:] ^ 128, _half(blocks[..., :2]), None


def _pack_mxfp4(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    """d: uint8, e8m0"""
    return torch.cat([d.unsqueeze(-1), _nibbles(codes)], dim=-1)


def _unpack_mxfp4(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _from_nibbles(blocks[..., 1:]), blocks[..., 0], None


def _pack_2_k(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    assert low is not None
    scales = (1 | low << 4).unsqueeze(-1).expand(*low.shape, 16)
    planes = _planes(codes.unflatten(-1, (2, 4, 32)), 2).flatten(-2)
    return torch.cat([scales, planes, _bytes(d), _bytes(d)], dim=-1)


def _unpack_2_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    scales, planes, d, dmin = blocks.split([16, 64, 2, 2], dim=-1)
    codes = _from_planes(planes.unflatten(-1, (2, 32)), 2).flatten(-3)
    alike = (scales == scales[..., :1]).all() and (scales & 15 == 1).all() and torch.equal(d, dmin)
    return codes, _half(d), scales[..., 0] >> 4 if alike else None


def _pack_3_k(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    high = _planes((codes >> 2).unflatten(-1, (8, 32)), 1)
    planes = _planes((codes & 3).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
    ones = torch.tensor(_ONES_3, dtype=torch.uint8, device=codes.device)
    return torch.cat([high, planes, ones.expand(*d.shape, 12), _bytes(d)], dim=-1)


def _unpack_3_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    high, planes, scales, d = blocks.split([32, 64, 12, 2], dim=-1)
    codes = _from_planes(planes.unflatten(-1, (2, 32)), 2).flatten(-3)
    codes = codes | _from_planes(high, 1).flatten(-2) << 2
    ones = torch.tensor(_ONES_3, dtype=torch.uint8)
    return codes, _half(d), torch.full_like(scales[..., 0], 4) if (scales == ones).all() else None


def _scales_of_zero(low: Tensor) -> Tensor:
    """Eight factors of one and eight zero points of 6 bits, (...) -> (..., 12): four of each in six bits,
    then the low halves of the others, whose upper bits are on top of the first four."""
    first, minimum, rest = torch.ones_like(low), low | (low >> 4) << 6, 1 | (low & 15) << 4
    return torch.stack([first, minimum, rest], dim=-1).repeat_interleave(4, dim=-1)


def _zero_of_scales(scales: Tensor, d: Tensor, dmin: Tensor) -> Tensor | None:
    low = scales[..., 4] & 63
    alike = torch.equal(scales, _scales_of_zero(low)) and torch.equal(d, dmin)
    return low if alike else None


def _pack_4_k(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    assert low is not None
    planes = _planes(codes.unflatten(-1, (4, 2, 32)), 4).flatten(-2)
    return torch.cat([_bytes(d), _bytes(d), _scales_of_zero(low), planes], dim=-1)


def _unpack_4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    d, dmin, scales, planes = blocks.split([2, 2, 12, 128], dim=-1)
    codes = _from_planes(planes.unflatten(-1, (4, 32)), 4).flatten(-3)
    return codes, _half(d), _zero_of_scales(scales, d, dmin)


def _pack_5_k(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    assert low is not None
    high = _planes((codes >> 4).unflatten(-1, (8, 32)), 1)
    planes = _planes((codes & 15).unflatten(-1, (4, 2, 32)), 4).flatten(-2)
    return torch.cat([_bytes(d), _bytes(d), _scales_of_zero(low), high, planes], dim=-1)


def _unpack_5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    d, dmin, scales, high, planes = blocks.split([2, 2, 12, 32, 128], dim=-1)
    codes = _from_planes(planes.unflatten(-1, (4, 32)), 4).flatten(-3)
    codes = codes | _from_planes(high, 1).flatten(-2) << 4
    return codes, _half(d), _zero_of_scales(scales, d, dmin)


def _pack_6_k(codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
    planes = _planes((codes & 15).unflatten(-1, (2, 2, 64)), 4).flatten(-2)
    high = _planes((codes >> 4).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
    ones = torch.ones((*d.shape, 16), dtype=torch.uint8, device=codes.device)
    return torch.cat([planes, high, ones, _bytes(d)], dim=-1)


def _unpack_6_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    planes, high, scales, d = blocks.split([128, 64, 16, 2], dim=-1)
    codes = _from_planes(planes.unflatten(-1, (2, 64)), 4).flatten(-3)
    codes = codes | _from_planes(high.unflatten(-1, (2, 32)), 2).flatten(-3) << 4
    return codes, _half(d), torch.full_like(scales[..., 0], 32) if (scales == 1).all() else None


BLOCKS = {
    "Q4_0": Block(SHORT, 18, 4, False, _pack_4, _unpack_4_0),
    "Q4_1": Block(SHORT, 20, 4, True, _pack_4, _unpack_4_1),
    "Q5_0": Block(SHORT, 22, 5, False, _pack_5, _unpack_5_0),
    "Q5_1": Block(SHORT, 24, 5, True, _pack_5, _unpack_5_1),
    "Q8_0": Block(SHORT, 34, 8, False, _pack_8, _unpack_8),
    "MXFP4": Block(SHORT, 17, 4, False, _pack_mxfp4, _unpack_mxfp4),
    "Q2_K": Block(LONG, 84, 2, True, _pack_2_k, _unpack_2_k),
    "Q3_K": Block(LONG, 110, 3, False, _pack_3_k, _unpack_3_k),
    "Q4_K": Block(LONG, 144, 4, True, _pack_4_k, _unpack_4_k),
    "Q5_K": Block(LONG, 176, 5, True, _pack_5_k, _unpack_5_k),
    "Q6_K": Block(LONG, 210, 6, False, _pack_6_k, _unpack_6_k),
}
# Names of types whose blocks hold a minimum in float16, and not a zero point.
MINIMUM = ("Q4_1", "Q5_1")
