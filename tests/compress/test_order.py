"""The order of stages."""

from __future__ import annotations

import itertools

import pytest

from compress import order
from compress.errors import UserError


def allowed(stages: tuple[str, ...]) -> bool:
    try:
        order.check_order(stages)
    except UserError:
        return False
    return True


def test_every_list_without_pruning_and_distillation() -> None:
    """rotate if wanted, then quantize with repair if wanted, or kv_cache, or both."""
    stages = [s for s in order.STAGES if s not in ("prune", "distill")]
    lists = itertools.chain.from_iterable(itertools.product(stages, repeat=n) for n in range(6))
    work = [("quantize",), ("quantize", "repair"), ()]
    expected = {
        (*before, *middle, *after)
        for before in ((), ("rotate",))
        for middle in work
        for after in ((), ("kv_cache",))
        if middle or after
    }
    assert {found for found in lists if allowed(found)} == expected


@pytest.mark.parametrize(
    ("stages", "fits"),
    [
        ("prune", True),
        ("prune distill", True),
        ("prune distill rotate quantize repair kv_cache", True),
        ("prune quantize distill", True),
        ("quantize distill", True),
        ("rotate quantize repair distill kv_cache", True),
        ("prune kv_cache", True),
        ("distill", False),
        ("distill quantize", False),
        ("rotate distill quantize", False),
        ("prune rotate distill", False),
        ("quantize distill rotate", False),
        ("quantize prune", False),
        ("prune repair", False),
        ("prune distill repair", False),
        ("prune distill quantize distill", False),
        ("prune prune", False),
    ],
)
def test_a_stage_may_have_two_places(stages: str, fits: bool) -> None:
    """Distillation mends what was pruned, before it is quantized, or what was quantized."""
    assert allowed(tuple(stages.split())) == fits
