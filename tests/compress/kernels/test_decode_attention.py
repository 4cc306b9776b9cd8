"""The kernel against its reference, on the interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
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
    batch, heads = stored.kept[0].shape[:2]
    assert stored.scheme is not None
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


# The interpreter computes bfloat16 in float32: there this holds conversions only, on a GPU all of it.
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
    assert (int(stored.counts[0]) + 1 > 111) == (name == "int4")
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


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_padding_and_sliding_window_together(name: str) -> None:
    """Against plain attention on the keys and values themselves: not what the store says is seen."""
    torch.manual_seed(0)
    fine = (
        StateScheme(bits=8, per="channel", group_size=16) if name == "int4" else StateScheme(bits=8)
    )
    scheme = CacheScheme(fine, StateScheme(bits=8), 0, 16)
    padding, window, tokens = torch.tensor([0, 70]), 111, 300
    keys, values = torch.randn(2, 2, 2, tokens, 64, device=DEVICE)
    layer = PackedLayer(scheme, padding=padding, sliding_window=window, dtype=torch.float32)
    layer.fused = True
    layer.update(keys[:, :, :150], values[:, :, :150])
    for start in range(150, tokens - 1):
        layer.update(keys[:, :, start : start + 1], values[:, :, start : start + 1])
    stored, _ = layer.update(keys[:, :, -1:], values[:, :, -1:])
    q = torch.randn(2, 4, 64, device=DEVICE)
    place = torch.arange(tokens, device=DEVICE)
    seen = (place >= tokens - window) & (place >= padding.to(DEVICE)[:, None])
    scores = q.unflatten(1, (2, 2)) @ keys.transpose(2, 3) / 8
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    expected = (scores.softmax(-1) @ values).flatten(1, 2)
    for found in (attend(q, stored, 1 / 8), attend_reference(q, stored, 1 / 8)):
        assert (found - expected).norm() / expected.norm() < 0.02


# Arguments of the kernels by the kind of memory they point to; q, kept keys and values are bfloat16.
POINTERS = {
    **dict.fromkeys(["ks_ptr", "kl_ptr", "vs_ptr", "vl_ptr"], "fp16"),
    **dict.fromkeys(["fixed_k_ptr", "fixed_v_ptr", "acc_ptr", "summary_ptr", "turn_ptr"], "fp32"),
    **dict.fromkeys(["cos_ptr", "sin_ptr"], "fp32"),
    **dict.fromkeys(["counts_ptr", "first_ptr"], "i64"),
}
CODES = {"k_ptr": "u8", "v_ptr": "u8"}
SHAPE = {"D": 128, "QUERIES": 4, "ROWS": 16, "BLOCK": 64, "LEAST": 4, "ONE": False}
STORE = {**SHAPE, "K_GROUPS": 1, "V_GROUPS": 1}
INT4 = {**STORE, "K_BITS": 4, "K_PER": 0, "K_LOW": True, "V_BITS": 4, "V_PER": 1, "V_LOW": True}
INT2 = {**INT4, "K_BITS": 2, "V_BITS": 2, "BLOCK": 32}
INT8 = {**STORE, "K_BITS": 8, "K_PER": 1, "K_LOW": False, "V_BITS": 8, "V_PER": 1, "V_LOW": False}
FP8_CODE = {**INT8, "K_PER": 2, "V_PER": 2}


def rotating(constants: dict[str, int | bool], **changes: int | bool) -> dict[str, int | bool]:
    names = ("D", "QUERIES", *(n for n in constants if n.startswith(("K_", "V_"))))
    found = {name: constants[name] for name in names}
    return {**found, "K_TURN": False, "V_TURN": False, "DIRECT": True, **changes}


@pytest.mark.parametrize(
    ("capability", "kernel", "constants"),
    [
        (90, "attend_kernel", INT4),
        (90, "attend_kernel", INT2),
        (90, "attend_kernel", INT8),
        (90, "attend_kernel", FP8_CODE),
        (80, "attend_kernel", {**INT4, "BLOCK": 128}),
        (89, "attend_kernel", {**FP8_CODE, "ONE": True}),
        (90, "sixteen_kernel", SHAPE),
        (80, "sixteen_kernel", {**SHAPE, "ONE": True}),
        (90, "combine_kernel", {"PARTS_PADDED": 128, "D": 128, "TURN": True}),
        (90, "combine_kernel", {"PARTS_PADDED": 128, "D": 128, "TURN": False}),
        (90, "rotate_kernel", rotating(INT8)),
        (90, "rotate_kernel", rotating({**INT4, "K_PER": 1}, K_TURN=True, V_TURN=True)),
        (90, "rotate_kernel", rotating(INT4, DIRECT=False, K_TURN=True)),
        (89, "rotate_kernel", rotating(FP8_CODE)),
    ],
)
def test_kernels_compile_for_gpus(
    capability: int, kernel: str, constants: dict[str, int | bool]
) -> None:
    """The interpreter accepts what the compiler does not; this needs no GPU. Shared memory must fit."""
    if capability == 90 and DEVICE.type == "cuda":
        pytest.skip("the other tests compile here")
    pointers = POINTERS | ({} if kernel == "sixteen_kernel" else CODES)
    script = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compress.kernels.triton_attention import {kernel} as kernel
pointers, constants = {pointers!r}, {constants!r}
names = kernel.arg_names
kinds = {{n: "*" + pointers.get(n, "bf16") if n.endswith("_ptr") else "i32" for n in names}}
kinds |= {{n: "fp32" for n in names if n == "scaling"}} | {{n: "constexpr" for n in constants}}
values = {{(names.index(n),): value for n, value in constants.items()}}
aligned = {{(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")}}
source = ASTSource(kernel, kinds, values, aligned)
made = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=dict(num_warps=4))
assert made.metadata.shared <= 99 * 1024, made.metadata.shared
"""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
