"""Keys and values in few bits: a store that grows by whole groups of tokens.

states (batch, heads, tokens, head_dim); scale and low, one for each group:
    per channel  (batch, heads, tokens / group, head_dim)
    per token    (batch, heads, tokens, head_dim / group)
    per head     (heads, 1, 1); per tensor (1,): fixed, not part of the store
Integers c stand for low + c * scale. 8 / bits of them share a byte: byte j of a token holds the channels
j, j + w, j + 2 w, ... with w the bytes of a token, the first in the lowest bits, so that a kernel
that unpacks a byte gets contiguous channels of each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.hadamard import hadamard
from compress.kv_cache.scheme import StateScheme
from compress.quantize.numbers import FLOATS, decode_float, encode_float


@dataclass(frozen=True)
class Packed:
    """Quantized states of consecutive tokens.

    codes: uint8 (batch, heads, tokens, head_dim * bits / 8); scale, low: float16, see above; low only if
    the integers are not symmetric
    """

    codes: Tensor
    scale: Tensor | None = None
    low: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The store with each of its tensors changed."""
        parts = (self.codes, self.scale, self.low)
        return Packed(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def append(self, other: Packed) -> Packed:
        """Both stores, ``other`` behind."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return Packed(*(torch.cat(pair, dim=2) for pair in pairs))

    def first(self, tokens: int) -> Packed:
        """A view of the first tokens, a multiple of those that share a scale."""
        return self.map(lambda part: part[:, :, : part.shape[2] * tokens // self.tokens])

    def without(self, tokens: int) -> Packed:
        """The store without its first tokens, a multiple of those that share a scale."""
        share = tokens / self.tokens
        return self.map(lambda part: part[:, :, round(share * part.shape[2]) :].clone())

    @property
    def tensors(self) -> list[Tensor]:
        return [part for part in (self.codes, self.scale, self.low) if part is not None]


def quantize(states: Tensor, scheme: StateScheme, scale: Tensor | None = None) -> Packed:
    """The states as the scheme stores them; tokens a multiple of its groups.

    scale: of static schemes, broadcastable to the states
    """
    x = states.float()
    if scheme.rotate:
        x = x @ rotation(x.shape[-1], x.device)
    if scale is not None:
        return Packed(encode_float(x / scale, scheme.bits))
    grouped, share = _grouped(x, scheme)
    largest = 2**scheme.bits - 1
    if scheme.symmetric:
        # As engines do it: 127 steps to each side, the code of zero in the middle.
        half = 2 ** (scheme.bits - 1)
        step = (grouped.abs().amax(share, keepdim=True) / (half - 1)).half()
        codes = (grouped / _safe(step)).round_().clamp_(1 - half, half - 1) + half
        return Packed(_pack(_ungrouped(codes, scheme), scheme.bits), _flat(step, scheme))
    low = grouped.amin(share, keepdim=True).half()
    step = ((grouped.amax(share, keepdim=True) - low) / largest).half()
    codes = ((grouped - low) / _safe(step)).round_().clamp_(0, largest)
    packed = _pack(_ungrouped(codes, scheme), scheme.bits)
    return Packed(packed, _flat(step, scheme), _flat(low, scheme))


def dequantize(packed: Packed, scheme: StateScheme, scale: Tensor | None = None) -> Tensor:
    """What a store stands for, float32 (batch, heads, tokens, head_dim). scale: as for ``quantize``"""
    if scale is not None:
        return decode_float(packed.codes, scheme.bits) * scale
    assert packed.scale is not None
    codes, _ = _grouped(_unpack(packed.codes, scheme.bits).float(), scheme)
    step = _spread(packed.scale, scheme)
    low = -(2 ** (scheme.bits - 1)) * step if packed.low is None else _spread(packed.low, scheme)
    x = _ungrouped(codes * step + low, scheme)
    return x @ rotation(x.shape[-1], x.device).T if scheme.rotate else x


@functools.lru_cache(maxsize=8)
def rotation(head_dim: int, device: torch.device) -> Tensor:
    """The Hadamard matrix over sqrt(head_dim) that ``rotate`` multiplies states with, from the right:
    float32 (head_dim, head_dim)."""
    return hadamard(head_dim).to(device, torch.float32) / math.sqrt(head_dim)


def _grouped(x: Tensor, scheme: StateScheme) -> tuple[Tensor, int]:
    """A view in which those that share a scale lie along one axis, and that axis."""
    if scheme.per == "channel":
        return x.unflatten(2, (-1, scheme.tokens)), 3
    return x.unflatten(3, (-1, scheme.group_size or x.shape[3])), 4


def _ungrouped(x: Tensor, scheme: StateScheme) -> Tensor:
    return x.flatten(2, 3) if scheme.per == "channel" else x.flatten(3, 4)


def _flat(shared: Tensor, scheme: StateScheme) -> Tensor:
    return shared.squeeze(3 if scheme.per == "channel" else 4)


def _spread(shared: Tensor, scheme: StateScheme) -> Tensor:
    return shared.float().unsqueeze(3 if scheme.per == "channel" else 4)


def _safe(step: Tensor) -> Tensor:
    """Steps to divide by: a group of equal values has none."""
    return torch.where(step > 0, step, 1).float()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., head_dim) of any dtype -> bytes uint8 (..., head_dim * bits / 8)."""
    planes = codes.to(torch.uint8).unflatten(-1, (8 // bits, -1))
    packed = planes[..., 0, :].clone()
    for plane in range(1, 8 // bits):
        packed |= planes[..., plane, :] << (plane * bits)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``_pack``: uint8 (..., head_dim)."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)).flatten(-2)


def static_scale(largest: Tensor) -> Tensor:
    """The scale at which the largest |x| becomes the largest E4M3 number."""
    return (largest.float() / FLOATS["float", 8]).clamp(min=torch.finfo(torch.float32).tiny)
