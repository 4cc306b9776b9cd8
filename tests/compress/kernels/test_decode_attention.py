"""The kernel against its reference, on the interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.kernels.decode_attention import attend, attend_reference, supported
from compress.kv_cache.cache import PackedLayer, Scales, Stored
from compress.kv_cache.scheme import CacheScheme, StateScheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8, FP8_HEAD = StateScheme("float", 8, "tensor"), StateScheme("float", 8, "head")
SCHEMES = {
    "int4": CacheScheme(
        StateScheme(bits=4, per="channel", group_size=32), StateScheme(bits=4), 4, 40
    ),
    "int4-rotated": CacheScheme(
        StateScheme(bits=4, per="channel", group_size=64, rotate=True),
        StateScheme(bits=4, group_size=32, rotate=True),
        2,
        16,
    ),
    "int2": CacheScheme(
        StateScheme(bits=2, per="channel", group_size=16), StateScheme(bits=2, group_size=32), 3, 17
    ),
    "int8": CacheScheme(
        StateScheme(bits=8, symmetric=True), StateScheme(bits=8, symmetric=True), 0, 0
    ),
    "int4-token": CacheScheme(
        StateScheme(bits=4, group_size=32), StateScheme(bits=4, symmetric=True), 1, 8
    ),
    "int4-2-bit-values": CacheScheme(
        StateScheme(bits=4, per="channel", group_size=32, symmetric=True),
        StateScheme(bits=2),
        0,
        32,
    ),
    "fp8": CacheScheme(FP8, FP8),
    "fp8-head": CacheScheme(FP8_HEAD, FP8_HEAD, 4, 16),
}


def random_store(
    scheme: CacheScheme,
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 64,
    padding: Tensor | None = None,
    sliding_window: int | None = None,
) -> Stored:
    scales = None
    if scheme.static:
        shape = (heads, 1, 1) if scheme.keys.per == "head" else (1,)
        scales = Scales(
            torch.linspace(0.01, 0.03, shape[0], device=DEVICE).view(shape),
            torch.linspace(0.02, 0.01, shape[0], device=DEVICE).view(shape),
        )
    layer = PackedLayer(
        scheme, scales=scales, padding=padding, sliding_window=sliding_window, dtype=torch.float16
    )
    layer.fused = True
    # Fresh numbers in every run; channels of very different size, none around zero.
    shape = (batch, heads, tokens, head_dim)
    sizes = torch.randn(heads, 1, head_dim).exp()
    keys, values = (
        sizes * (torch.randn(shape) + torch.randn(heads, 1, head_dim)) for _ in range(2)
    )
    keys, values = keys.to(DEVICE), values.to(DEVICE)
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    stored, _ = layer.update(keys[:, :, -1:], values[:, :, -1:])
    assert isinstance(stored, Stored)
    return stored


def check(
    stored: Stored, queries: int, *, head_dim: int = 64, dtype: torch.dtype, tolerance: float
) -> None:
    batch, heads = stored.recent[0].shape[:2]
    assert supported(stored.scheme, head_dim, DEVICE)
    q = torch.randn(batch, heads * queries, head_dim, device=DEVICE, dtype=dtype)
    scaling = 0.3 / head_dim**0.5
    expected = attend_reference(q, stored, scaling)
    found = attend(q, stored, scaling)
    assert found.dtype == dtype
    error = (found.float() - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tokens", [2, 75, 421])
def test_kernel_equals_reference(name: str, tokens: int) -> None:
    stored = random_store(SCHEMES[name], tokens)
    precise = DEVICE.type == "cpu"
    check(stored, 3, dtype=torch.float32, tolerance=1e-5 if precise else 3e-3)


@pytest.mark.parametrize("name", ["int4-rotated", "int2", "int8", "fp8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
def test_in_half_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    check(random_store(SCHEMES[name], 300), 4, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("queries", [1, 17])
def test_queries_of_a_head(name: str, queries: int) -> None:
    check(
        random_store(SCHEMES[name], 200, batch=1, heads=3, head_dim=128),
        queries,
        head_dim=128,
        dtype=torch.float32,
        tolerance=1e-5 if DEVICE.type == "cpu" else 3e-3,
    )


@pytest.mark.parametrize("name", ["int4", "int8", "fp8-head"])
def test_padding_is_not_seen(name: str) -> None:
    padding = torch.tensor([0, 70, 131])
    stored = random_store(SCHEMES[name], 300, batch=3, padding=padding)
    check(stored, 3, dtype=torch.float32, tolerance=1e-5 if DEVICE.type == "cpu" else 3e-3)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_sliding_window(name: str) -> None:
    stored = random_store(SCHEMES[name], 300, sliding_window=111)
    # Whole groups are dropped, so some tokens of the first one are out of sight.
    assert (stored.oldest > 0) == (name == "int4")
    check(stored, 2, dtype=torch.float32, tolerance=1e-5 if DEVICE.type == "cpu" else 3e-3)


def test_what_the_kernel_does_not_take() -> None:
    plain = StateScheme(bits=4, per="channel", group_size=32)
    odd = StateScheme(bits=4, per="channel", group_size=24)
    narrow = StateScheme(bits=4, group_size=16)
    for scheme in (CacheScheme(odd, StateScheme()), CacheScheme(plain, narrow)):
        assert not supported(scheme, 64, DEVICE)
    taken = CacheScheme(plain, StateScheme())
    assert supported(taken, 64, DEVICE)
    assert not supported(replace(taken, pre_rope=True), 64, DEVICE)
    # Half a byte of 24 channels is no power of two.
    assert not supported(taken, 24, DEVICE)
