"""One query token against a packed cache, unpacked on the way through: decode attention whose cost is the
bytes of the cache.

q (batch, query heads, head_dim); the store as in ``compress.kv_cache.cache.Stored``. A program of the kernel
takes one key-value head, all its query heads and a stretch of the context (Flash-Decoding); sinks and recent
tokens are stretches of their own. Keys are never scaled one by one: a scale of a channel goes into the query,
one of a token into its score, and values' scales into the probabilities.
"""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from compress.kv_cache.cache import Scales, Stored
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.states import Packed, dequantize, rotation

NAME = "packed-attention"
# Tokens of a step, where no group of the keys says it, and the most that fit; the least side of a
# matrix product.
BLOCK, MOST, SIDE = 64, 128, 16
# Programs that keep a large GPU busy: four on each of some 132 multiprocessors.
PROGRAMS = 528
# Stretches of a head that the last kernel adds up at once.
STRETCHES = 126
LOG2E = math.log2(math.e)


def supported(scheme: CacheScheme, head_dim: int, device: torch.device) -> bool:
    """Whether the kernel can attend to such a store here. It reads keys behind the rotary embedding, groups
    of a power of two of tokens, and whole heads or groups of channels no narrower than those that one
    position of a byte holds."""
    group = scheme.keys.tokens if scheme.keys.per == "channel" else BLOCK
    if (
        importlib.util.find_spec("triton") is None
        or scheme.pre_rope
        or not SIDE <= group <= MOST
        or group & (group - 1)
    ):
        return False
    for state in (scheme.keys, scheme.values):
        plane = head_dim * state.bits // 8
        narrow = state.per == "token" and (state.group_size or head_dim) < plane
        if narrow or plane < SIDE or plane & (plane - 1):
            return False
    if device.type == "cuda":
        # Older GPUs do not convert E4M3.
        return not scheme.static or torch.cuda.get_device_capability(device) >= (8, 9)
    # The interpreter runs kernels on a CPU, slowly: for tests.
    return os.environ.get("TRITON_INTERPRET") == "1"


def attend_reference(q: Tensor, stored: Stored, scaling: float) -> Tensor:
    """What the kernel computes, in float32, from unpacked states: (batch, query heads, head_dim)."""
    keys, values = (
        torch.cat([stored.sinks[i].float(), *_unpacked(stored, i), stored.recent[i].float()], dim=2)
        for i in (0, 1)
    )
    heads, sinks = keys.shape[1], stored.sinks[0].shape[2]
    scores = q.float().unflatten(1, (heads, -1)) @ keys.transpose(2, 3) * scaling
    place = torch.arange(keys.shape[2], device=q.device) - sinks
    unseen = (place >= 0) & (place < _first_seen(q, stored)[:, None])
    scores = scores.masked_fill(unseen[:, None, None, :], -torch.inf)
    return (scores.softmax(-1) @ values).flatten(1, 2)


def _unpacked(stored: Stored, which: int) -> list[Tensor]:
    if stored.packed is None:
        return []
    scheme = (stored.scheme.keys, stored.scheme.values)[which]
    scales = stored.scales
    scale = None if scales is None else (scales.keys, scales.values)[which]
    return [dequantize(stored.packed[which], scheme, scale)]


def _first_seen(q: Tensor, stored: Stored) -> Tensor:
    """The first token behind the sinks that each row sees, int64 (batch,)."""
    first = torch.full((len(q),), stored.oldest, device=q.device)
    return first if stored.padding is None else first.maximum(stored.padding)


def attend(q: Tensor, stored: Stored, scaling: float) -> Tensor:
    """Attention of one token, in the dtype of q."""
    # Here, not above: a machine without a GPU needs no compiler for one.
    from compress.kernels.triton_attention import attend_kernel, combine_kernel

    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The interpreter loads bfloat16 but does not calculate in it.
        return attend(q.float(), stored, scaling).to(q.dtype)
    batch, query_heads, head_dim = q.shape
    heads = stored.recent[0].shape[1]
    keys, values = stored.scheme.keys, stored.scheme.values
    packed = stored.packed or (_nothing(stored, keys), _nothing(stored, values))
    block = keys.tokens if keys.per == "channel" else BLOCK
    tokens = packed[0].tokens
    stretches = max(1, min(STRETCHES, PROGRAMS // (batch * heads), -(-tokens // (4 * block))))
    stretch = -(-tokens // (stretches * block)) * block
    parts = stretches + 2
    accumulated = torch.empty(
        batch, query_heads, parts, head_dim, dtype=torch.float32, device=q.device
    )
    summary = torch.empty(batch, query_heads, parts, 2, dtype=torch.float32, device=q.device)
    q = q.contiguous()
    # Turned keys meet a turned query: the product is the same.
    q_packed = (q.float() @ rotation(head_dim, q.device)).to(q.dtype) if keys.rotate else q
    scales = stored.scales or Scales(*(torch.ones(1, device=q.device) for _ in range(2)))
    blank = summary  # stands in for tensors that a scheme has not
    attend_kernel[(batch * heads, parts)](
        q,
        q_packed,
        packed[0].codes,
        *(blank if part is None else part for part in (packed[0].scale, packed[0].low)),
        packed[1].codes,
        *(blank if part is None else part for part in (packed[1].scale, packed[1].low)),
        scales.keys.expand(heads, 1, 1).contiguous() if keys.static else scales.keys,
        scales.values.expand(heads, 1, 1).contiguous() if values.static else scales.values,
        stored.sinks[0],
        stored.sinks[1],
        stored.recent[0],
        stored.recent[1],
        _first_seen(q, stored),
        accumulated,
        summary,
        scaling * LOG2E,
        tokens,
        stored.sinks[0].shape[2],
        stored.recent[0].shape[2],
        stretch,
        stretches,
        heads,
        D=head_dim,
        QUERIES=query_heads // heads,
        ROWS=max(SIDE, _power_of_2(query_heads // heads)),
        BLOCK=block,
        K_BITS=keys.bits,
        K_PER=_layout(keys),
        K_GROUPS=head_dim // (keys.group_size or head_dim) if keys.per == "token" else 1,
        K_LOW=packed[0].low is not None,
        V_BITS=values.bits,
        V_PER=_layout(values),
        V_GROUPS=head_dim // (values.group_size or head_dim),
        V_LOW=packed[1].low is not None,
        num_warps=4,
    )
    out = torch.empty(2, batch, query_heads, head_dim, dtype=torch.float32, device=q.device)
    combine_kernel[(batch * query_heads,)](
        accumulated,
        summary,
        out,
        batch * query_heads * head_dim,
        parts,
        PARTS_PADDED=_power_of_2(parts),
        D=head_dim,
    )
    if values.rotate:
        return (out[0] @ rotation(head_dim, q.device).T + out[1]).to(q.dtype)
    return (out[0] + out[1]).to(q.dtype)


def _power_of_2(n: int) -> int:
    """The smallest one that is no less than n."""
    return 1 << (n - 1).bit_length()


def _layout(state: StateScheme) -> int:
    return {"channel": 0, "token": 1}.get(state.per, 2)


def _nothing(stored: Stored, state: StateScheme) -> Packed:
    recent = stored.recent[0]
    batch, heads, _, head_dim = recent.shape
    codes = torch.empty(
        batch, heads, 0, head_dim * state.bits // 8, dtype=torch.uint8, device=recent.device
    )
    none = codes.to(torch.float16)
    return Packed(codes, none, None if state.symmetric or state.static else none)
