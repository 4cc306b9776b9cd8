"""Number formats: which values a stored code stands for, before its scale.

int b:  levels -2^(b-1) .. 2^(b-1) - 1, stored as unsigned codes with 2^(b-1) or a zero point added
e4m3:   8-bit floating point without infinities (OCP 8-bit Floating Point Specification, 4.1), largest 448;
        the code is the byte
e2m1:   4-bit floating point (OCP Microscaling Formats, 5.3.3), 0 .5 1 1.5 2 3 4 6 and their negatives;
        bit 3 of the code is the sign
Scales are kept in 16 or 32 bits, in e4m3, or in e8m0 (a power of two, the byte is its exponent + 127).
"""

from __future__ import annotations

import torch
from torch import Tensor

# (type, bits) -> the largest value.
FLOATS = {("float", 8): 448.0, ("float", 4): 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127


def encode_float(x: Tensor, bits: int) -> Tensor:
    """Nearest codes uint8 of x float32, ties to even; beyond the largest value, the largest."""
    if bits == 8:
        # The cast alone would make NaN of what is too large.
        largest = FLOATS["float", 8]
        return x.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
    size = round_float(x, bits).abs()
    # 0 .5 1 1.5 2 are steps of a half, 2 3 4 of one, 4 6 of two.
    index = torch.where(size <= 2, 2 * size, torch.where(size <= 4, size + 2, size / 2 + 4))
    return index.to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def round_float(x: Tensor, bits: int) -> Tensor:
    """x float32 as it comes back from its nearest code, float32."""
    if bits == 8:
        return decode_float(encode_float(x, bits), bits)
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = (size / step).round_().mul_(step).clamp_(max=FLOATS["float", 4])
    return rounded.copysign_(x)


def decode_float(codes: Tensor, bits: int) -> Tensor:
    """What codes uint8 stand for, float32, same shape."""
    if bits == 8:
        return codes.view(torch.float8_e4m3fn).float()
    values = torch.tensor(_E2M1, device=codes.device)
    return torch.cat([values, -values])[codes.int()]


def decode_scale(scale: Tensor) -> Tensor:
    """A stored scale as float32: e8m0 is kept as uint8, the others as their own dtype."""
    if scale.dtype == torch.uint8:
        exponent = scale.int() - E8M0_BIAS
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), exponent)
    return scale.float()
