"""One query token against a cache, in 16 bits or packed and unpacked on the way through: decode attention
whose cost is the bytes of the cache.

q (batch, query heads, head_dim); the store as in ``compress.kv_cache.cache.Stored``. A program of the kernel
takes one key-value head, all its query heads and a stretch of the context (Flash-Decoding); tokens of a
packed cache that are in 16 bits are stretches of their own. How many programs there are follows from the
room of the buffers, and what is in them is read on the device, so that a step can be a captured graph. Keys
are never scaled one by one: a scale of a channel goes into the query, one of a token into its score, and
values' scales into the probabilities.
"""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from compress.kv_cache.cache import Stored
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.states import Packed, dequantize, rotation

NAME = "packed-attention"
# What counts as a kernel where none fits: keys and values unpacked before attention reads them.
UNPACKED = "unpacked-cache"
# Tokens of a step, where no group of the keys says it, and the most that fit; the least side of a
# matrix product.
BLOCK, MOST, SIDE = 64, 128, 16
# Programs that keep a large GPU busy: four on each of some 132 multiprocessors.
PROGRAMS = 528
# Parts of a head that the last kernel adds up at once; blocks that are worth a part of their own.
PARTS, LEAST, LEAST_16 = 128, 4, 2
# Tokens in 16 bits of a part beside the store, and the most such parts.
KEPT, KEPT_PARTS = 128, 16
# A sliding window that sees everything.
NO_WINDOW = 2**31 - 1
LOG2E = math.log2(math.e)


def supported(scheme: CacheScheme | None, head_dim: int, device: torch.device) -> bool:
    """Whether the kernels can attend to such a store here; scheme None: one in 16 bits. They read keys
    behind the rotary embedding, groups of a power of two of tokens, and whole heads or groups of channels no
    narrower than those that one position of a byte holds."""
    if importlib.util.find_spec("triton") is None or head_dim < SIDE or head_dim & (head_dim - 1):
        return False
    if scheme is not None and not _fits(scheme, head_dim):
        return False
    if device.type == "cuda":
        # Older GPUs do not convert E4M3.
        floats = scheme is not None and scheme.static
        return not floats or torch.cuda.get_device_capability(device) >= (8, 9)
    # The interpreter runs kernels on a CPU, slowly: for tests.
    return os.environ.get("TRITON_INTERPRET") == "1"


def _fits(scheme: CacheScheme, head_dim: int) -> bool:
    group = scheme.keys.tokens if scheme.keys.per == "channel" else BLOCK
    if scheme.pre_rope or not SIDE <= group <= MOST or group & (group - 1):
        return False
    for state in (scheme.keys, scheme.values):
        plane = head_dim * state.bits // 8
        if plane < SIDE or (state.per == "token" and (state.group_size or head_dim) < plane):
            return False
    return True


def attend_reference(q: Tensor, stored: Stored, scaling: float) -> Tensor:
    """What the kernel computes, in float32, from unpacked states: (batch, query heads, head_dim)."""
    place, packed, sinks = stored.counts.tolist()
    tokens, window = place + 1, stored.sliding_window
    keys, values = (
        torch.cat([kept[:, :, :sinks], *store, kept[:, :, sinks : tokens - packed]], dim=2)
        for kept, store in ((stored.kept[i].float(), _unpacked(stored, i, packed)) for i in (0, 1))
    )
    scores = q.float().unflatten(1, (keys.shape[1], -1)) @ keys.transpose(2, 3) * scaling
    index = torch.arange(tokens, device=q.device)
    first = stored.first if window is None else stored.first.clamp(min=tokens - window)
    unseen = (index >= sinks) & (index - sinks < first[:, None])
    scores = scores.masked_fill(unseen[:, None, None, :], -torch.inf)
    return (scores.softmax(-1) @ values).flatten(1, 2)


def _unpacked(stored: Stored, which: int, tokens: int) -> list[Tensor]:
    if stored.packed is None or stored.scheme is None:
        return []
    scheme = (stored.scheme.keys, stored.scheme.values)[which]
    scales = stored.scales
    scale = None if scales is None else (scales.keys, scales.values)[which]
    return [dequantize(stored.packed[which], scheme, scale)[:, :, :tokens]]


def attend(q: Tensor, stored: Stored, scaling: float, *, turned: Tensor | None = None) -> Tensor:
    """Attention of one token, in the dtype of q. turned: q by the rotation of stored keys, if it is there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The interpreter loads bfloat16 but does not calculate in it.
        return attend(q.float(), stored, scaling).to(q.dtype)
    if stored.scheme is None:
        return _attend_sixteen(q.contiguous(), stored, scaling)
    return _attend_packed(q.contiguous(), stored, stored.scheme, scaling, turned)


def _attend_sixteen(q: Tensor, stored: Stored, scaling: float) -> Tensor:
    # Here, not above: a machine without a GPU needs no compiler for one.
    from compress.kernels.triton_attention import sixteen_kernel

    batch, query_heads, head_dim = q.shape
    _, heads, capacity, _ = stored.kept[0].shape
    parts = max(1, min(PARTS, PROGRAMS // (batch * heads), -(-capacity // (LEAST_16 * BLOCK))))
    result = _Result(q, parts)
    sixteen_kernel[(batch * heads, parts)](
        q,
        *stored.kept,
        stored.counts,
        stored.first,
        result.accumulated,
        result.summary,
        scaling * LOG2E,
        capacity,
        stored.sliding_window or NO_WINDOW,
        parts,
        heads,
        D=head_dim,
        QUERIES=query_heads // heads,
        ROWS=max(SIDE, _power_of_2(query_heads // heads)),
        BLOCK=BLOCK,
        LEAST=LEAST_16,
        ONE=result.one,
        num_warps=4,
    )
    return result.combined()


def _attend_packed(
    q: Tensor, stored: Stored, scheme: CacheScheme, scaling: float, turned: Tensor | None
) -> Tensor:
    from compress.kernels.triton_attention import attend_kernel

    batch, query_heads, head_dim = q.shape
    _, heads, kept_capacity, _ = stored.kept[0].shape
    keys, values = scheme.keys, scheme.values
    packed = stored.packed or (_nothing(stored, keys), _nothing(stored, values))
    block = keys.tokens if keys.per == "channel" else BLOCK
    capacity = packed[0].tokens
    # Parts of few tokens in 16 bits, more where a window is so long that there would be many.
    kept_stretch = -(-max(KEPT, -(-kept_capacity // KEPT_PARTS)) // block) * block
    kept_parts = -(-kept_capacity // kept_stretch)
    stretches = max(
        1,
        min(PARTS - kept_parts, PROGRAMS // (batch * heads), -(-capacity // (LEAST * block))),
    )
    parts = stretches + kept_parts
    turn = rotation(head_dim, q.device) if values.rotate else None
    result = _Result(q, parts, stretches, turn)
    if keys.rotate and turned is None:
        # Turned keys meet a turned query: the product is the same.
        turned = (q.float() @ rotation(head_dim, q.device)).to(q.dtype)
    blank = result.summary  # stands in for tensors that a scheme has not
    attend_kernel[(batch * heads, parts)](
        q,
        q if turned is None else turned,
        *parts_of(packed[0], blank),
        *parts_of(packed[1], blank),
        *fixed_of(stored, blank),
        *stored.kept,
        stored.counts,
        stored.first,
        result.accumulated,
        result.summary,
        scaling * LOG2E,
        capacity,
        kept_capacity,
        kept_stretch,
        stored.sliding_window or NO_WINDOW,
        stretches,
        parts,
        heads,
        D=head_dim,
        QUERIES=query_heads // heads,
        ROWS=max(SIDE, _power_of_2(query_heads // heads)),
        BLOCK=block,
        LEAST=LEAST,
        ONE=result.one,
        K_BITS=keys.bits,
        K_PER=layout(keys),
        K_GROUPS=groups(keys, head_dim),
        K_LOW=packed[0].low is not None,
        V_BITS=values.bits,
        V_PER=layout(values),
        V_GROUPS=groups(values, head_dim),
        V_LOW=packed[1].low is not None,
        num_warps=4,
    )
    return result.combined()


class _Result:
    """Where the parts of a kernel leave what they found, to be combined.

    accumulated: (batch, query heads, parts, head_dim); summary: (batch, query heads, parts, 2), maximum
        and sum. A single part whose result need not be turned leaves the result itself.
    """

    def __init__(self, q: Tensor, parts: int, stretches: int = 0, turn: Tensor | None = None):
        """stretches: how many parts, the first ones, ``turn`` turns back: float32 (head_dim, head_dim)"""
        self._out = torch.empty_like(q)
        self._parts, self._stretches, self._turn = parts, stretches, turn
        self.one = parts == 1 and turn is None
        shape = (*q.shape[:2], parts)
        self.summary = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
        self.accumulated = self._out
        if not self.one:
            self.accumulated = self.summary.new_empty((*shape, q.shape[2]))

    def combined(self) -> Tensor:
        if self.one:
            return self._out
        from compress.kernels.triton_attention import combine_kernel

        batch, query_heads, head_dim = self._out.shape
        combine_kernel[(batch * query_heads,)](
            self.accumulated,
            self.summary,
            self.summary if self._turn is None else self._turn,
            self._out,
            self._parts,
            self._stretches,
            PARTS_PADDED=_power_of_2(self._parts),
            D=head_dim,
            TURN=self._turn is not None,
        )
        return self._out


def _power_of_2(n: int) -> int:
    """The smallest one that is no less than n."""
    return 1 << (n - 1).bit_length()


def parts_of(packed: Packed, blank: Tensor) -> list[Tensor]:
    """Codes, scale and low, ``blank`` for those that there are not."""
    return [blank if part is None else part for part in (packed.codes, packed.scale, packed.low)]


def fixed_of(stored: Stored, blank: Tensor) -> list[Tensor]:
    """The fixed scales of keys and values, one for each head."""
    if stored.scales is None:
        return [blank, blank]
    scales = stored.scales.of_heads(stored.kept[0].shape[1])
    return [scales.keys, scales.values]


def layout(state: StateScheme) -> int:
    """What shares a scale, as the kernels have it."""
    return {"channel": 0, "token": 1}.get(state.per, 2)


def groups(state: StateScheme, head_dim: int) -> int:
    """Scales of a token."""
    return head_dim // (state.group_size or head_dim) if state.per == "token" else 1


def _nothing(stored: Stored, state: StateScheme) -> Packed:
    kept = stored.kept[0]
    batch, heads, _, head_dim = kept.shape
    codes = torch.empty(
        batch, heads, 0, head_dim * state.bits // 8, dtype=torch.uint8, device=kept.device
    )
    none = codes.to(torch.float16)
    return Packed(codes, none, None if state.symmetric or state.static else none)
