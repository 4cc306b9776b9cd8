"""Dense bit packing: integers of any width as one little-endian bit stream a row.

Element i of a row occupies bits [i*b, i*b + b) of the row's int32 words; elements may straddle
words, so 32 elements take exactly b words. compressed-tensors packs so since 0.18, and classic GPTQ
3-bit words are the same stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def packed_width(elements: int, bits: int) -> int:
    """int32 words that a row of this many elements takes."""
    return -(-elements * bits // 32)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n), each below 2**bits -> int32 (rows, ceil(n * bits / 32))."""
    rows, n = values.shape
    padded = torch.nn.functional.pad(values, (0, -n % BLOCK))
    blocks = padded.view(rows, -1, BLOCK).to(torch.int64)
    words = torch.zeros(rows, blocks.shape[1], bits, dtype=torch.int64, device=values.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= blocks[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= blocks[..., i] >> (32 - shift)
    # The shifted values may exceed 32 bits; the excess went to the next word above.
    words &= 0xFFFFFFFF
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.flatten(1)[:, : packed_width(n, bits)].to(torch.int32).contiguous()


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """int32 (rows, ceil(n * bits / 32)) -> uint8 (rows, n): the inverse of ``pack_rows``."""
    rows, width = packed.shape
    assert width == packed_width(n, bits), (width, n, bits)
    padded = torch.nn.functional.pad(packed, (0, -width % bits))
    words = padded.view(rows, -1, bits).to(torch.int64) & 0xFFFFFFFF
    values = torch.empty(rows, words.shape[1], BLOCK, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        value = words[..., word] >> shift
        if shift + bits > 32:
            value = value | (words[..., word + 1] << (32 - shift))
        values[..., i] = (value & mask).to(torch.uint8)
    return values.flatten(1)[:, :n].contiguous()
