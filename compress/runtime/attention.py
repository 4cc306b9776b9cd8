"""Which attention runs over a static cache here."""

from __future__ import annotations

from torch import Tensor

from compress.kernels import cpu_attention
from compress.kernels.static_attention import StaticAttention
from compress.kv_cache.cache import Pair
from compress.kv_cache.static import StaticCache
from compress.runtime.network import Attend, Heads


class CpuAttention:
    """Turns, writes and attends in one call a layer, over a cache in 16 bits."""

    def __init__(self, cache: StaticCache, angles: Pair, heads: Heads):
        self._cache, self._angles, self._heads = cache, angles, heads
        self._layers = list(zip(cache.keys, cache.values, cache.windows, strict=True))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        cache, heads = self._cache, self._heads
        if layer == 0:
            # The same for all layers of a step.
            positions = (cache.length - cache.first).clamp_(min=0)
            self._cos, self._sin = (angle[positions] for angle in self._angles)
        keys, values, window = self._layers[layer]
        return cpu_attention.attend(
            qkv,
            self._cos,
            self._sin,
            keys,
            values,
            cache.first,
            cache.length,
            heads.queries,
            heads.keys,
            heads.scaling,
            window or 0,
        )


def attention(cache: StaticCache, angles: Pair, heads: Heads) -> tuple[str, Attend]:
    """The name of what runs, and (layer, qkv) -> (batch, heads * head_dim).

    angles: cos and sin of every position of the cache, float32 (capacity, head_dim)
    """
    if cache.scheme is None and cpu_attention.supports(heads.size, cache.device, cache.dtype):
        return cpu_attention.NAME, CpuAttention(cache, angles, heads)
    found = StaticAttention(cache, angles, heads.scaling)
    return found.kernel, found
