"""Attention of one token of each row over a static cache: queries and keys turned by position, keys and
values written, and all up to them attended to. How many tokens there are is read on the device.

qkv (batch, (query heads + 2 * heads) * head_dim): queries, keys, values, as a merged projection makes them
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from compress.kernels.decode_attention import (
    UNPACKED,
    attend,
    fixed_of,
    groups,
    layout,
    parts_of,
    supported,
)
from compress.kv_cache.cache import Pair, turn
from compress.kv_cache.scheme import StateScheme
from compress.kv_cache.states import rotation
from compress.kv_cache.static import StaticCache

NAME = "static-attention"
# What runs where they do not, over 16 bits.
TORCH = "sdpa"
# Stands in for a scheme where all is in 16 bits.
NO_SCHEME = StateScheme(bits=8)


class StaticAttention:
    """What runs over a cache here.

    kernel: its name
    """

    def __init__(
        self,
        cache: StaticCache,
        angles: Pair,
        scaling: float,
        *,
        fused: bool | None = None,
    ):
        """angles: cos and sin of every position, float32 (positions, head_dim); fused: whether the kernels
        run, if not wherever they are compiled"""
        self.cache, self.scaling = cache, scaling
        self._angles = angles
        if fused is None:
            head_dim = cache.keys.shape[4]
            fused = (
                cache.device.type == "cuda"
                # In float32 the matrix unit would keep fewer bits than were asked for.
                and cache.dtype in (torch.float16, torch.bfloat16)
                and supported(cache.scheme, head_dim, cache.device)
            )
        self._fused = fused
        self.kernel = NAME if fused else TORCH if cache.scheme is None else UNPACKED

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Write a layer's newest token and attend to all, in the dtype of qkv: (batch, query heads *
        head_dim). Raises ValueError if there is no room for it, which nothing does where a graph is replayed.
        """
        self.cache.checked(self.cache.length + 1)
        if self._fused:
            q, turned = rotate_and_write(qkv, self.cache, layer, self._angles)
            stored = self.cache.stored[layer]
            return attend(q, stored, self.scaling, turned=turned).flatten(1)
        q = rotate_and_write_reference(qkv, self.cache, layer, self._angles)
        keys, values, seen = self.cache.read(layer)
        out = scaled_dot_product_attention(
            q.unflatten(1, (keys.shape[1], -1)).to(keys.dtype),
            keys,
            values,
            attn_mask=seen[:, None, None],
            scale=self.scaling,
        )
        return out.flatten(1).to(qkv.dtype)


def rotate_and_write_reference(qkv: Tensor, cache: StaticCache, layer: int, angles: Pair) -> Tensor:
    """What ``rotate_and_write`` does, in float32 and rounded once: the turned queries (batch, query
    heads, head_dim)."""
    heads, head_dim = cache.keys.shape[2], cache.keys.shape[4]
    states = qkv.view(len(qkv), -1, head_dim)
    positions = (cache.place - cache.first).clamp(min=0)
    cos, sin = (angle[positions].unsqueeze(1) for angle in angles)
    turned = turn(states[:, :-heads].float(), cos, sin).to(qkv.dtype)
    cache.write(layer, turned[:, -heads:], states[:, -heads:])
    return turned[:, :-heads]


def rotate_and_write(
    qkv: Tensor, cache: StaticCache, layer: int, angles: Pair
) -> tuple[Tensor, Tensor | None]:
    """The queries turned by position, and those by the rotation of stored keys, if there is one. Keys and
    values are in the cache then, quantized where the scheme keeps no window."""
    # Here, not above: a machine without a GPU needs no compiler for one.
    from compress.kernels.triton_attention import rotate_kernel

    stored, scheme = cache.stored[layer], cache.scheme
    _, heads, kept_capacity, head_dim = stored.kept[0].shape
    q = qkv.new_empty(len(qkv), qkv.shape[1] // head_dim - 2 * heads, head_dim)
    keys, values = (NO_SCHEME, NO_SCHEME) if scheme is None else (scheme.keys, scheme.values)
    turned = torch.empty_like(q) if keys.rotate else None
    turn_by = rotation(head_dim, cache.device) if keys.rotate or values.rotate else cache.counts
    store = [cache.counts] * 6
    if stored.packed is not None:
        store = [part for packed in stored.packed for part in parts_of(packed, cache.counts)]
    rotate_kernel[(len(q), q.shape[1] + 2 * heads)](
        qkv.contiguous(),
        *angles,
        turn_by,
        cache.counts,
        cache.first,
        q,
        q if turned is None else turned,
        *stored.kept,
        *store,
        *fixed_of(stored, cache.counts),
        kept_capacity,
        0 if stored.packed is None else stored.packed[0].tokens,
        heads,
        D=head_dim,
        QUERIES=q.shape[1] // heads,
        DIRECT=scheme is not None and scheme.direct,
        K_BITS=keys.bits,
        K_PER=layout(keys),
        K_GROUPS=groups(keys, head_dim),
        K_LOW=not keys.symmetric,
        K_TURN=keys.rotate,
        V_BITS=values.bits,
        V_PER=layout(values),
        V_GROUPS=groups(values, head_dim),
        V_LOW=not values.symmetric,
        V_TURN=values.rotate,
        num_warps=4 if keys.rotate or values.rotate else 1,
    )
    return q, turned
