"""In which order a recipe may list its stages."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import UserError

# Every place a stage may have, in order, and what must come directly before it there; None: whatever stands
# above it, or nothing. A stage may have several places here, and one of them in a recipe.
ORDER: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("prune", None),
    ("distill", ("prune",)),
    ("rotate", None),
    ("quantize", None),
    ("repair", ("quantize",)),
    ("distill", ("quantize", "repair")),
    ("kv_cache", None),
)
STAGES = tuple(dict.fromkeys(name for name, _ in ORDER))
# What makes a model smaller; without one of these the other stages have nothing to prepare or to mend.
SHRINKING = ("prune", "quantize", "kv_cache")


def check_order(stages: Sequence[str]) -> None:
    """Raises UserError for known stages in an order that ``ORDER`` does not have."""
    if not _fits(stages) or not set(stages) & set(SHRINKING):
        places = (
            name if before is None else f"{name} (directly after {' or '.join(before)})"
            for name, before in ORDER
        )
        raise UserError(
            f"stages={list(stages)} is not allowed: choose from {', '.join(places)} in this order, each at "
            f"most once, with {' or '.join(SHRINKING)} among them"
        )


def _fits(stages: Sequence[str]) -> bool:
    # Each search goes on behind the place that the last one found.
    places, last = iter(ORDER), None
    for stage in stages:
        if not any(n == stage and (b is None or last in b) for n, b in places):
            return False
        last = stage
    return len(set(stages)) == len(stages)
