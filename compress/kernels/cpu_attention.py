"""Attention of one token a sequence on a CPU with AVX-512 and its bf16 instructions, over caches in 16 bits:
turns query and key, writes key and value, and attends, in one call (``cpu.cpp``).

qkv bf16 (batch, (heads + 2 kv_heads) * head_dim) as merged projections give it; cos, sin bf16 or float32
(batch, head_dim) of the token's position; keys, values bf16 (batch, kv_heads, capacity, head_dim), of which
index ``place`` is written; first int64 (batch,): the first token that is none of padding
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels import cpu_library
from compress.kv_cache.cache import turn

NAME = "attention-avx512"
# The kernel reads heads in steps of this many channels.
CHANNELS = 32


def supports(head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``attend`` runs here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and head_dim % CHANNELS == 0
        and cpu_library.available()
    )


def reference(  # noqa: PLR0913
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    place: int,
    heads: int,
    kv_heads: int,
    scaling: float,
    window: int,
) -> Tensor:
    """What the kernel computes, in float32, and what it writes: (batch, heads * head_dim)."""
    head_dim = keys.shape[3]
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    keys[:, :, place] = _turned(k, cos, sin)
    values[:, :, place] = v
    q = _turned(q, cos, sin).float().unflatten(1, (kv_heads, -1))
    seen_keys, seen_values = (t[:, :, : place + 1].float() for t in (keys, values))
    scores = q @ seen_keys.transpose(2, 3) * scaling
    oldest = first if window <= 0 else first.clamp(min=place + 1 - window)
    unseen = torch.arange(place + 1) < oldest[:, None]
    scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ seen_values).flatten(1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, head_dim) at its place, rounded once."""
    return turn(x.float(), cos.float()[:, None], sin.float()[:, None]).to(x.dtype)


def attend(  # noqa: PLR0913
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    place: int,
    heads: int,
    kv_heads: int,
    scaling: float,
    window: int,
) -> Tensor:
    """bf16 (batch, heads * head_dim). window: how many tokens are seen at most, this one included; 0: all"""
    return torch.ops.compress.decode_attention.default(
        qkv, cos, sin, keys, values, first, place, heads, kv_heads, scaling, window
    )
