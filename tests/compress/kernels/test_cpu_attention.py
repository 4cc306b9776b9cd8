"""Decode attention in C++ against float32: padding, windows, shared heads, and a context in stretches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compress.kernels.cpu_attention import attend, reference, supports

CPU, BF16 = torch.device("cpu"), torch.bfloat16
# Outputs are rounded to bf16; a query rounded to the other side moves a score by a step.
BOUND = 4e-3

pytestmark = pytest.mark.skipif(
    not supports(64, CPU, BF16),
    reason="needs a CPU with AVX-512 and its bf16 instructions, and a C++ compiler",
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def example(
    place: int,
    batch: int = 1,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    window: int = 0,
    turns: torch.dtype = BF16,
) -> dict[str, Any]:
    keys, values = torch.randn(2, batch, kv_heads, place + 5, head_dim).to(BF16)
    # What lies behind the token must not be read.
    keys[:, :, place:], values[:, :, place:] = torch.nan, torch.nan
    angles = torch.rand(batch, head_dim // 2).mul(6).repeat(1, 2)
    return {
        "qkv": 2 * torch.randn(batch, (heads + 2 * kv_heads) * head_dim).to(BF16),
        "cos": angles.cos().to(turns),
        "sin": angles.sin().to(turns),
        "keys": keys,
        "values": values,
        "first": torch.zeros(batch, dtype=torch.int64),
        "place": place,
        "heads": heads,
        "kv_heads": kv_heads,
        "scaling": head_dim**-0.5,
        "window": window,
    }


def check(given: dict[str, Any]) -> None:
    wanted = {**given, "keys": given["keys"].clone(), "values": given["values"].clone()}
    expected = reference(**wanted)
    y = attend(**given)
    assert (y.shape, y.dtype) == (expected.shape, BF16)
    assert float((y.float() - expected).norm() / expected.norm()) < BOUND
    # The token's own key and value, and nothing else.
    assert torch.equal(given["values"].view(torch.int16), wanted["values"].view(torch.int16))
    keys, wanted_keys = (g["keys"].float().nan_to_num(7) for g in (given, wanted))
    # One product more may be fused with its sum.
    assert torch.allclose(keys, wanted_keys, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 15, 16, 127, 128, 300, 2100, 5000])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (14, 2), (5, 1)], ids=str)
def test_contexts(place: int, heads: tuple[int, int]) -> None:
    check(example(place, heads=heads[0], kv_heads=heads[1]))


@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
@pytest.mark.parametrize("turns", [BF16, torch.float32])
def test_heads(head_dim: int, turns: torch.dtype) -> None:
    check(example(200, batch=2, heads=4, kv_heads=2, head_dim=head_dim, turns=turns))


@pytest.mark.parametrize("window", [0, 1, 100, 4096])
@pytest.mark.parametrize("place", [90, 700, 3000])
def test_padding_and_windows(window: int, place: int) -> None:
    given = example(place, batch=3, window=window)
    given["first"] = torch.tensor([0, place - 50, place])
    # Padding and what has left the window must not be read either.
    for row, first in enumerate(given["first"].tolist()):
        oldest = max(first, place + 1 - window) if window else first
        # Values there are multiplied with nothing in the reference, so they stay finite.
        given["keys"][row, :, :oldest] = 1e4
        given["values"][row, :, :oldest] = 1e4
    check(given)


def test_threads_do_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    given = example(3000, batch=2)
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(attend(**given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_large_scores_stay_finite() -> None:
    given = example(500)
    given["qkv"] *= 100
    y, expected = attend(**given), reference(**given)
    assert torch.allclose(y.float(), expected, atol=0.05)


def test_a_part_of_a_larger_cache() -> None:
    given = example(100)
    plain = attend(**given)
    for name in ("keys", "values"):
        both = torch.stack([given[name], given[name]], dim=2)
        given[name] = both[:, :, 1]
    assert torch.equal(attend(**given), plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"place": 105},
        {"place": -1},
        {"kv_heads": 1},
        {"cos": torch.ones(1, 32, dtype=BF16)},
        {"first": torch.tensor([101])},
        {"first": torch.zeros(1, dtype=torch.int32)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_wrong_sizes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        attend(**{**example(100), **changes})


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(80, BF16), (64, torch.float32)], ids=["80 channels", "float32"]
)
def test_what_does_not_fit_is_declined(head_dim: int, dtype: torch.dtype) -> None:
    assert not supports(head_dim, CPU, dtype)
