"""The kernels over a static cache against torch, step by step; on the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.kernels.decode_attention import UNPACKED, attend_reference, supported
from compress.kernels.static_attention import (
    NAME,
    TORCH,
    StaticAttention,
    rotate_and_write,
    rotate_and_write_reference,
)
from compress.kv_cache.cache import Pair, Scales
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.states import dequantize
from compress.kv_cache.static import StaticCache
from tests.compress.kernels.test_decode_attention import SCHEMES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = 2
TURNED = StateScheme(bits=4, rotate=True)
DIRECT = {
    "int8": SCHEMES["int8"],
    "int8-sinks": CacheScheme(StateScheme(bits=8), StateScheme(bits=8), sinks=3),
    "int4-rotated": CacheScheme(TURNED, TURNED),
    "int4-2-groups": CacheScheme(
        StateScheme(bits=4, group_size=64), StateScheme(bits=2, group_size=32, symmetric=True)
    ),
    "fp8": SCHEMES["fp8"],
    "fp8-head": CacheScheme(SCHEMES["fp8-head"].keys, SCHEMES["fp8-head"].values),
}


def angles_of(head_dim: int, positions: int = 1000) -> Pair:
    frequencies = 1e4 ** -(torch.arange(head_dim // 2, device=DEVICE) / (head_dim // 2))
    angles = torch.arange(positions, device=DEVICE)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def new_cache(
    scheme: CacheScheme | None,
    capacity: int,
    *,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    batch: int = 2,
) -> StaticCache:
    scales = None
    if scheme is not None and scheme.static:
        shape = (HEADS, 1, 1) if scheme.keys.per == "head" else (1,)
        scales = [
            Scales(
                torch.linspace(0.01, 0.02, shape[0], device=DEVICE).view(shape),
                torch.linspace(0.03, 0.015, shape[0], device=DEVICE).view(shape),
            )
        ]
    return StaticCache(
        (1, batch, HEADS, head_dim),
        capacity,
        dtype=dtype,
        device=DEVICE,
        scheme=scheme,
        scales=scales,
        sliding_windows=[window],
    )


def fill(cache: StaticCache, tokens: int, padding: list[int] | None = None) -> None:
    _, batch, heads, _, head_dim = cache.keys.shape
    cache.reset(None if padding is None else torch.tensor(padding, device=DEVICE))
    keys, values = torch.randn(2, batch, heads, tokens, head_dim, device=DEVICE)
    cache.fill(0, keys, values)


def check_steps(
    caches: tuple[StaticCache, StaticCache],
    queries: int,
    steps: int,
    *,
    tolerance: float = 1e-5,
    prompt: int,
    padding: list[int] | None = None,
) -> None:
    """Both caches, one with kernels, through the same tokens."""
    fused, plain = caches
    head_dim = fused.keys.shape[4]
    for cache in caches:
        torch.manual_seed(1)
        fill(cache, prompt, padding)
    angles = angles_of(head_dim)
    assert supported(fused.scheme, head_dim, DEVICE)
    kernels = StaticAttention(fused, angles, head_dim**-0.5, fused=True)
    other = StaticAttention(plain, angles, head_dim**-0.5, fused=False)
    assert kernels.kernel == NAME
    for _ in range(steps):
        qkv = torch.randn(len(fused.first), (queries + 2) * HEADS * head_dim, device=DEVICE)
        qkv = qkv.to(fused.dtype)
        found, expected = kernels(0, qkv), other(0, qkv)
        assert found.dtype == qkv.dtype
        assert found.shape == (len(qkv), queries * HEADS * head_dim)
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < (tolerance if DEVICE.type == "cpu" else max(tolerance, 5e-3)), float(error)
        for cache in caches:
            cache.advance_device()
            cache.advance_host()
            if cache.needs_pack:
                cache.pack_device()
                cache.pack_host()


@pytest.mark.parametrize(
    ("head_dim", "queries", "dtype"),
    [(64, 1, torch.float32), (128, 3, torch.float16), (128, 4, torch.float32)],
)
@pytest.mark.parametrize("prompt", [1, 150, 300])
def test_sixteen_bits(head_dim: int, queries: int, dtype: torch.dtype, prompt: int) -> None:
    """Over capacities that blocks do not divide, one part and several."""
    caches = [new_cache(None, 333, head_dim=head_dim, dtype=dtype) for _ in range(2)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    check_steps((caches[0], caches[1]), queries, 3, prompt=prompt, tolerance=tolerance)


@pytest.mark.parametrize("programs", [1, 528])
@pytest.mark.parametrize("window", [None, 100])
def test_sixteen_bits_with_padding(
    programs: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.kernels.decode_attention.PROGRAMS", programs)
    caches = [new_cache(None, 411, window=window, dtype=torch.bfloat16) for _ in range(2)]
    check_steps((caches[0], caches[1]), 3, 3, prompt=201, padding=[0, 77], tolerance=1e-2)


@pytest.mark.parametrize("name", SCHEMES)
def test_packed(name: str) -> None:
    """Up to and over a pack, with padding."""
    scheme = SCHEMES[name]
    caches = [new_cache(scheme, 301) for _ in range(2)]
    # The third token fills the room of the recent ones.
    prompt = scheme.sinks + scheme.window + 4 * scheme.step - 3
    prompt = max(prompt, 99) if scheme.direct else prompt
    tolerance = 1e-3 if scheme.direct else 1e-5
    padding = [min(33, prompt - scheme.sinks - 1), 0]
    check_steps((caches[0], caches[1]), 3, 4, prompt=prompt, padding=padding, tolerance=tolerance)


@pytest.mark.parametrize("name", DIRECT)
def test_packed_at_once(name: str) -> None:
    caches = [new_cache(DIRECT[name], 200, head_dim=128) for _ in range(2)]
    # A number between two codes may fall to either side.
    check_steps((caches[0], caches[1]), 4, 1, prompt=170, tolerance=1e-3)
    # From nothing on, so that a scheme's sinks come first.
    check_steps((caches[0], caches[1]), 4, 4, prompt=1, tolerance=1e-3)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_packed_with_a_sliding_window(name: str) -> None:
    caches = [new_cache(SCHEMES[name], 300, window=61) for _ in range(2)]
    check_steps((caches[0], caches[1]), 2, 2, prompt=250, padding=[0, 200], tolerance=1e-3)


def written(
    scheme: CacheScheme | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[StaticCache, StaticCache]]:
    """Queries and caches after a token was written by the kernel and by torch."""
    qkv = (torch.randn(2, 5 * HEADS * 64, device=DEVICE) * 3).to(dtype)
    caches = new_cache(scheme, 60, dtype=dtype), new_cache(scheme, 60, dtype=dtype)
    for cache in caches:
        torch.manual_seed(2)
        fill(cache, 47, [0, 11])
    q, _ = rotate_and_write(qkv, caches[0], 0, angles_of(64))
    return (q, rotate_and_write_reference(qkv, caches[1], 0, angles_of(64))), caches


@pytest.mark.parametrize("name", ["sixteen", "int4", "int4-rotated"])
def test_what_is_written_in_16_bits(name: str) -> None:
    q, caches = written({"sixteen": None, **SCHEMES}[name], torch.bfloat16)
    # The interpreter cuts bfloat16 off instead of rounding.
    close = {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(*q, **close)
    torch.testing.assert_close(caches[0].keys, caches[1].keys, **close)
    torch.testing.assert_close(caches[0].values, caches[1].values, **close)
    assert (caches[0].keys != 0).any(-1).sum(-1).unique() == int(caches[0].place) + 1 - int(
        caches[0].counts[1]
    )


@pytest.mark.parametrize("name", DIRECT)
def test_what_is_quantized_at_once(name: str) -> None:
    scheme = DIRECT[name]
    q, caches = written(scheme, torch.float16)
    torch.testing.assert_close(*q)
    place = 47 - scheme.sinks
    for i, state in enumerate((scheme.keys, scheme.values)):
        found = []
        for cache in caches:
            assert cache.stored[0].packed is not None
            codes = (cache.stored[0].packed[i].codes != 0).any(-1).any(1)
            # The token is there, and none behind it was touched.
            assert codes[:, : place + 1].all()
            assert not codes[:, place + 1 :].any()
            scale = cache.scales and (cache.scales[0].keys, cache.scales[0].values)[i]
            found.append(dequantize(cache.stored[0].packed[i], state, scale)[:, :, : place + 1])
        assert torch.equal(found[0][:, :, :-1], found[1][:, :, :-1])
        error = (found[0] - found[1])[:, :, -1].norm() / found[1][:, :, -1].norm()
        assert error < (1e-3 if DEVICE.type == "cpu" else 5e-2)


def test_reference_reads_what_a_cache_reads() -> None:
    """The reference for kernels, which unpacks by itself, over buffers with room to spare."""
    cache = new_cache(SCHEMES["int4"], 200)
    fill(cache, 130, [0, 40])
    attention = StaticAttention(cache, angles_of(64), 0.1, fused=False)
    assert attention.kernel == UNPACKED
    qkv = torch.randn(2, 5 * HEADS * 64, device=DEVICE)
    found = attention(0, qkv)
    q = rotate_and_write_reference(qkv, cache, 0, angles_of(64))
    expected = attend_reference(q, cache.stored[0], 0.1).flatten(1)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_no_room() -> None:
    cache = new_cache(None, 20)
    fill(cache, 20)
    with pytest.raises(ValueError, match="20 tokens has no room for 21"):
        StaticAttention(cache, angles_of(64), 0.1)(0, torch.randn(2, 5 * HEADS * 64, device=DEVICE))


def test_what_runs_here() -> None:
    runs = NAME if DEVICE.type == "cuda" else TORCH
    assert StaticAttention(new_cache(None, 9), angles_of(64), 0.1).kernel == runs
    assert not supported(None, 48, DEVICE)
