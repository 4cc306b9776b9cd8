"""Steps over a static cache as captured graphs: what is replayed equals what runs one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.compose import compose_settings
from compress.config import parse
from compress.kernels.decode_attention import attend_reference
from compress.kernels.static_attention import (
    NAME,
    StaticAttention,
    rotate_and_write_reference,
)
from compress.kv_cache.cache import Pair, Scales
from compress.kv_cache.scheme import CacheScheme
from compress.kv_cache.static import StaticCache

pytestmark = pytest.mark.gpu

LAYERS, BATCH, QUERIES, HEADS, DIM, CAPACITY = 2, 2, 4, 8, 128, 3000
PROMPT, STEPS = 1000, 200
SCALING = DIM**-0.5
SCHEMES = ["sixteen", "fp8", "fp8-head", "int8", "int4-token", "int4", "int2"]


def scheme_of(name: str) -> CacheScheme | None:
    if name == "sixteen":
        return None
    return parse(compose_settings(["recipe=kv-fp8", f"kv_cache={name}"])).cache


def angles() -> Pair:
    frequencies = 1e4 ** -(torch.arange(DIM // 2, device="cuda") / (DIM // 2))
    turns = torch.arange(CAPACITY, device="cuda")[:, None] * frequencies
    turns = torch.cat([turns, turns], dim=1)
    return turns.cos(), turns.sin()


def filled(scheme: CacheScheme | None, window: int | None = None) -> StaticCache:
    scales = None
    if scheme is not None and scheme.static:
        shape = (HEADS, 1, 1) if scheme.keys.per == "head" else (1,)
        scales = [
            Scales(*(torch.full(shape, 0.02, device="cuda") for _ in range(2)))
            for _ in range(LAYERS)
        ]
    cache = StaticCache(
        (LAYERS, BATCH, HEADS, DIM),
        CAPACITY,
        device="cuda",
        scheme=scheme,
        scales=scales,
        sliding_windows=[window] * LAYERS,
    )
    fill(cache)
    return cache


def fill(cache: StaticCache) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    cache.reset(torch.tensor([0, 300], device="cuda"))
    for layer in range(LAYERS):
        shape = (2, BATCH, HEADS, PROMPT, DIM)
        keys, values = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        cache.fill(layer, keys, values)


def tokens() -> Tensor:
    """What the projections of every step and layer make."""
    shape = (STEPS, LAYERS, BATCH, (QUERIES + 2) * HEADS * DIM)
    return torch.randn(
        shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda"
    ).bfloat16()


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize("name", SCHEMES)
def test_replayed_steps_are_those_that_run_one_by_one(name: str, window: int | None) -> None:
    scheme, qkv = scheme_of(name), tokens()
    cache = filled(scheme, window)
    attention = StaticAttention(cache, angles(), SCALING)
    assert attention.kernel == NAME
    given = torch.empty_like(qkv[0])
    out = torch.empty(LAYERS, BATCH, QUERIES * HEADS * DIM, dtype=torch.bfloat16, device="cuda")

    def step() -> None:
        for layer in range(LAYERS):
            out[layer] = attention(layer, given[layer])
        cache.advance_device()

    def decode(step: Callable[[], None], pack: Callable[[], None]) -> tuple[Tensor, int]:
        found, packs = [], 0
        for row in qkv:
            given.copy_(row)
            step()
            cache.advance_host()
            found.append(out.clone())
            if cache.needs_pack:
                pack()
                cache.pack_host()
                packs += 1
        assert int(cache.place) == cache.length == PROMPT + STEPS
        return torch.stack(found), packs

    expected, packs = decode(step, cache.pack_device)
    assert (packs >= 3) == (scheme is not None and not scheme.direct)
    step_graph = captured(step)
    pack_graph = captured(cache.pack_device) if packs else None
    pack = cache.pack_device if pack_graph is None else pack_graph.replay
    # Twice: the second sequence begins where buffers hold the first.
    for _ in range(2):
        fill(cache)
        replayed, _ = decode(step_graph.replay, pack)
        assert torch.equal(replayed, expected)


@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize("name", SCHEMES)
def test_kernels_agree_with_torch(name: str, window: int | None) -> None:
    """Step by step, each over its own cache; and the kernel on the very same cache."""
    scheme, qkv = scheme_of(name), tokens()
    ours, theirs = filled(scheme, window), filled(scheme, window)
    kernels = StaticAttention(ours, angles(), SCALING)
    plain = StaticAttention(theirs, angles(), SCALING, fused=False)
    for row in qkv[:140]:
        for layer in range(LAYERS):
            found, other = kernels(layer, row[layer]).float(), plain(layer, row[layer]).float()
            assert (found - other).norm() / other.norm() < 0.03
        for cache in (ours, theirs):
            cache.advance_device()
            cache.advance_host()
            if cache.needs_pack:
                cache.pack_device()
                cache.pack_host()
    found = kernels(0, qkv[0, 0]).float()
    q = rotate_and_write_reference(qkv[0, 0], ours, 0, angles())
    expected = attend_reference(q, ours.stored[0], SCALING).flatten(1)
    assert (found - expected).norm() / expected.norm() < 0.02


def test_the_torch_path_can_be_captured_too() -> None:
    """As where a scheme has no kernel."""
    scheme = scheme_of("int4")
    cache, qkv = filled(scheme), tokens()[0]
    attention = StaticAttention(cache, angles(), SCALING, fused=False)
    expected = [attention(layer, qkv[layer]) for layer in range(LAYERS)]
    found: list[Tensor] = []
    graph = captured(lambda: found.extend(attention(i, qkv[i]) for i in range(LAYERS)))
    cache.keys.zero_()
    fill(cache)
    graph.replay()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < 1e-2
