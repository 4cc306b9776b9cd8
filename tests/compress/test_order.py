"""The order of stages: every list of today's, and of the table with stages that stand in several places."""

from __future__ import annotations

import itertools

import pytest

from compress import order
from compress.errors import UserError

TODAY = {
    ("quantize",),
    ("kv_cache",),
    ("rotate", "quantize"),
    ("rotate", "kv_cache"),
    ("quantize", "repair"),
    ("quantize", "kv_cache"),
    ("rotate", "quantize", "repair"),
    ("rotate", "quantize", "kv_cache"),
    ("quantize", "repair", "kv_cache"),
    ("rotate", "quantize", "repair", "kv_cache"),
}


def allowed(stages: tuple[str, ...]) -> bool:
    try:
        order.check_order(stages)
    except UserError:
        return False
    return True


def test_every_list_of_stages() -> None:
    lists = itertools.chain.from_iterable(
        itertools.product(order.STAGES, repeat=n) for n in range(len(order.STAGES) + 2)
    )
    assert {stages for stages in lists if allowed(stages)} == TODAY


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
def test_a_stage_may_have_two_places(
    stages: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distillation mends what was pruned, before it is quantized, or what was quantized."""
    places = [
        ("prune", None),
        ("distill", ("prune",)),
        *order.ORDER[:3],
        ("distill", ("quantize", "repair")),
        *order.ORDER[3:],
    ]
    monkeypatch.setattr(order, "ORDER", tuple(places))
    monkeypatch.setattr(order, "SHRINKING", ("prune", *order.SHRINKING))
    assert allowed(tuple(stages.split())) == fits
