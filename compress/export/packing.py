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
    # Element by element and word by word in one piece each: several times faster than with strides.
    elements = padded.view(-1, BLOCK).T.to(torch.int32).contiguous()
    words = torch.zeros(bits, elements.shape[1], dtype=torch.int32, device=values.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        # What is shifted out at the top belongs to the next word.
        words[word] |= elements[i] << shift
        if shift + bits > 32:
            words[word + 1] |= elements[i] >> (32 - shift)
    return words.T.contiguous().view(rows, -1)[:, : packed_width(n, bits)].contiguous()


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """int32 (rows, ceil(n * bits / 32)) -> uint8 (rows, n): the inverse of ``pack_rows``."""
    rows, width = packed.shape
    assert width == packed_width(n, bits), (width, n, bits)
    padded = torch.nn.functional.pad(packed, (0, -width % bits))
    words = padded.view(-1, bits).T.contiguous()
    values = torch.empty(BLOCK, words.shape[1], dtype=torch.uint8, device=packed.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        low = min(bits, 32 - shift)
        # Words are signed and so is their shift: only the bits that are asked for count.
        value = (words[word] >> shift) & (2**low - 1)
        if low < bits:
            value |= (words[word + 1] & (2 ** (bits - low) - 1)) << low
        values[i] = value
    return values.T.contiguous().view(rows, -1)[:, :n].contiguous()
