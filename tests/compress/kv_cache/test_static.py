"""The static cache holds what a packed layer does, token by token, in every scheme."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.kv_cache.cache import PackedLayer, Pair, Scales
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.static import StaticCache

FP8, FP8_HEAD = StateScheme("float", 8, "tensor"), StateScheme("float", 8, "head")
INT8 = StateScheme(bits=8, symmetric=True)
SCHEMES = {
    "int4": CacheScheme(
        StateScheme(bits=4, per="channel", group_size=8, rotate=True),
        StateScheme(bits=4, rotate=True),
        4,
        20,
    ),
    "int2": CacheScheme(
        StateScheme(bits=2, per="channel", group_size=16), StateScheme(bits=2, group_size=8), 3, 7
    ),
    "int4-no-window": CacheScheme(
        StateScheme(bits=4, per="channel", group_size=8, symmetric=True), StateScheme(bits=2), 1, 0
    ),
    "int2-pre-rope": CacheScheme(
        StateScheme(bits=2, per="channel", group_size=8), StateScheme(bits=2), 3, 12, True
    ),
    "int8": CacheScheme(INT8, INT8),
    "int8-pre-rope": CacheScheme(INT8, INT8, pre_rope=True),
    "int8-sinks": CacheScheme(INT8, INT8, sinks=5),
    "int4-token": CacheScheme(
        StateScheme(bits=4, group_size=16), StateScheme(bits=4, symmetric=True), 1, 8
    ),
    "fp8": CacheScheme(FP8, FP8),
    "fp8-head": CacheScheme(FP8_HEAD, FP8_HEAD, 4, 9),
}
LAYERS, BATCH, HEADS, DIM = 2, 2, 3, 32
TOKENS = 90


def scales_of(scheme: CacheScheme | None) -> list[Scales] | None:
    if scheme is None or not scheme.static:
        return None
    shape = (HEADS, 1, 1) if scheme.keys.per == "head" else (1,)
    return [Scales(*(torch.rand(shape) * 0.02 + 0.01 for _ in range(2))) for _ in range(LAYERS)]


def rotary(positions: Tensor) -> Pair:
    angles = positions[..., None] / 100 ** (torch.arange(DIM // 2) / (DIM // 2))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def new_cache(scheme: CacheScheme | None, capacity: int = TOKENS, **more: object) -> StaticCache:
    return StaticCache(
        (LAYERS, BATCH, HEADS, DIM),
        capacity,
        scheme=scheme,
        rotary=rotary,
        **{"dtype": torch.float32, "scales": scales_of(scheme), **more},  # type: ignore[arg-type]
    )


def new_layer(cache: StaticCache, layer: int) -> PackedLayer:
    assert cache.scheme is not None
    return PackedLayer(
        cache.scheme,
        dtype=cache.dtype,
        scales=None if cache.scales is None else cache.scales[layer],
        rotary=rotary,
        padding=cache.first.clone() if cache.first.any() else None,
        sliding_window=cache.windows[layer],
    )


def random_states(tokens: int = TOKENS) -> list[Pair]:
    shape = (BATCH, HEADS, tokens, DIM)
    return [
        (torch.randn(shape) * 2 + torch.randn(HEADS, 1, DIM), torch.randn(shape))
        for _ in range(LAYERS)
    ]


def check(cache: StaticCache, layer: int, expected: Pair) -> None:
    """Against keys and values (batch, heads, tokens, head_dim) in the order of the text."""
    *found, seen = cache.read(layer)
    tokens = cache.length + 1
    packed, sinks = cache.counts[1:].tolist()
    kept = tokens - packed
    assert seen.shape[1] == tokens
    window = cache.windows[layer] or tokens
    for row, padding in enumerate(cache.first.tolist()):
        # Where each place of the row is: own first tokens come before the padding.
        places = [
            i - padding if i < padding + sinks else i
            for i in range(max(padding, tokens - window), tokens)
        ]
        index = [
            i if i < sinks else kept + i - sinks if i < sinks + packed else i - packed
            for i in places
        ]
        assert sorted(index) == seen[row].nonzero().flatten().tolist()
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours[row][:, index], theirs[row][:, -len(index) :])


def decode(cache: StaticCache, states: list[Pair], prompt: int) -> None:
    """Fill and write all tokens, comparing at each with packed layers."""
    layers = [new_layer(cache, i) for i in range(LAYERS)]
    for i, (keys, values) in enumerate(states):
        if prompt:
            cache.fill(i, keys[:, :, :prompt], values[:, :, :prompt])
            layers[i].update(keys[:, :, :prompt], values[:, :, :prompt])
    for token in range(prompt, states[0][0].shape[2]):
        for i, (keys, values) in enumerate(states):
            cache.write(i, keys[:, :, token], values[:, :, token])
            one = slice(token, token + 1)
            check(cache, i, layers[i].update(keys[:, :, one], values[:, :, one]))
        cache.advance_device()
        cache.advance_host()
        if cache.needs_pack:
            cache.pack_device()
            cache.pack_host()
        assert cache.counts.tolist() == [cache.length, cache._packed_tokens, cache._sinks]
    assert cache.length == states[0][0].shape[2]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("prompt", [30, 2, 0])
def test_holds_what_packed_layers_hold(name: str, prompt: int) -> None:
    """Over several packs, from prompts with sinks and without; a cache can be used again."""
    cache = new_cache(SCHEMES[name])
    decode(cache, random_states(), prompt)
    cache.reset()
    decode(cache, random_states(50), 40)


@pytest.mark.parametrize("name", SCHEMES)
def test_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here layers are packed one after the other, as where they are large."""
    monkeypatch.setattr("compress.kv_cache.static.AT_ONCE", 1)
    cache = new_cache(SCHEMES[name])
    # With the second, a row has fewer tokens than there are sinks.
    for padding in ([0, 13], [28, 0]):
        cache.reset(torch.tensor(padding))
        decode(cache, random_states(), 30)


@pytest.mark.parametrize("name", ["int4", "int8", "int4-token", "int4-no-window"])
def test_sliding_windows(name: str) -> None:
    cache = new_cache(SCHEMES[name], sliding_windows=[31, 31])
    decode(cache, random_states(), 60)
    cache.reset(torch.tensor([0, 40]))
    decode(cache, random_states(), 50)


def test_layers_with_and_without_windows() -> None:
    decode(new_cache(SCHEMES["int8"], sliding_windows=[None, 17]), random_states(), 40)
    with pytest.raises(ValueError, match="sliding layers keep no sinks"):
        new_cache(SCHEMES["int4"], sliding_windows=[None, 17])


def test_sixteen_bits() -> None:
    cache = new_cache(None, sliding_windows=[None, 17])
    cache.reset(torch.tensor([5, 0]))
    states = random_states()
    for i, (keys, values) in enumerate(states):
        cache.fill(i, keys[:, :, :40], values[:, :, :40])
    for token in range(40, TOKENS):
        for i, (keys, values) in enumerate(states):
            cache.write(i, keys[:, :, token], values[:, :, token])
            check(cache, i, (keys[:, :, : token + 1], values[:, :, : token + 1]))
        cache.advance_device()
        cache.advance_host()
        assert not cache.needs_pack
        assert int(cache.place) == cache.length


def test_takes_over_what_a_packed_layer_read_in_pieces() -> None:
    cache = new_cache(SCHEMES["int4"], sliding_windows=[23, 23])
    states = random_states()
    for i, (keys, values) in enumerate(states):
        layer = new_layer(cache, i)
        for start in range(0, 89, 20):
            piece = slice(start, min(start + 20, 89))
            layer.update(keys[:, :, piece], values[:, :, piece])
        cache.take(i, layer)
        cache.write(i, keys[:, :, 89], values[:, :, 89])
        check(cache, i, layer.update(keys[:, :, 89:], values[:, :, 89:]))


@pytest.mark.parametrize("name", ["int4", "int2", "int8", "fp8-head"])
def test_memory(name: str) -> None:
    """What the scheme counts for the capacity, but for the room of a step."""
    scheme, capacity = SCHEMES[name], 400
    cache = new_cache(scheme, capacity, dtype=torch.bfloat16)
    sixteen = 2 * 2 * LAYERS * BATCH * HEADS * DIM
    counted = scheme.share(capacity, DIM) * sixteen * capacity
    assert counted <= cache.nbytes <= counted + 2 * scheme.step * sixteen
    assert new_cache(None, capacity, dtype=torch.bfloat16).nbytes == sixteen * capacity


def test_no_room() -> None:
    states = random_states(21)
    for scheme in (None, SCHEMES["int4"], SCHEMES["int8"]):
        cache = new_cache(scheme, 20)
        with pytest.raises(ValueError, match="20 tokens has no room for 21"):
            cache.fill(0, *states[0])
        keys, values = states[0]
        cache.fill(0, keys[:, :, :20], values[:, :, :20])
        with pytest.raises(ValueError, match="20 tokens has no room for 21"):
            cache.advance_host()
    with pytest.raises(ValueError, match="no cache has"):
        new_cache(None, 0)
    with pytest.raises(ValueError, match="needs its scales"):
        new_cache(SCHEMES["fp8"], scales=None)
