"""What runs are compared by: figures of accuracy, size and speed, each with its interval if it has one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.report.gate import perplexity_ratio, task_difference
from compress.report.table import Row, first_point, short, speedup
from eval.speed import pattern_of
from eval.task_scores import headline

Point = Mapping[str, Any]
# Between what is asked and of whom, in the words of a point.
ASKED_OF = " tokens in/out, "


@dataclass(frozen=True)
class Value:
    """A figure, and the interval it lies in: of 95 %, of two standard errors, or between quartiles."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """One figure of every row. values: None where a row was not measured

    less: the smaller the better; log: drawn on a logarithmic axis
    """

    title: str
    less: bool
    values: list[Value | None]
    log: bool = False


def accuracy_measures(rows: list[Row]) -> list[Measure]:
    """KL, perplexity ratio and top-1 agreement of every text; what every task lost."""
    texts = dict.fromkeys(text for row in rows for text in row.values.get("texts") or {})
    tasks = dict.fromkeys(task for row in rows for task in row.values.get("tasks") or {})
    found = []
    for kind, title, less, log in (
        (_kl, "KL of {}, nats per token", True, True),
        (_ratio, "perplexity over the original's, {}", True, False),
        (_top1, "top-1 agreement on {}, %", False, False),
    ):
        found += [
            Measure(title.format(text), less, [kind(row, text) for row in rows], log)
            for text in texts
        ]
    found += [
        Measure(
            f"{short(task)}, points over the original", False, [_task(row, task) for row in rows]
        )
        for task in tasks
    ]
    return [measure for measure in found if any(measure.values)]


def _text(row: Row, text: str) -> Mapping[str, Any]:
    return (row.values.get("texts") or {}).get(text) or {}


def _kl(row: Row, text: str) -> Value | None:
    found = _text(row, text)
    # Of an original: 16 bits against 32, below which no difference means anything.
    found = (found.get("noise") or {}) if row.base is None else found
    return _paired(found, "kl")


def _paired(found: Mapping[str, Any], key: str, unit: float = 1) -> Value | None:
    if key not in found:
        return None
    interval = found.get("paired", found).get(key)
    if isinstance(interval, Mapping):
        return Value(unit * found[key], *_ends(interval, unit))
    stderr = found.get(f"{key}_stderr")
    if stderr is None or math.isnan(stderr):
        return Value(unit * found[key])
    low, high = (unit * (found[key] + sign * 1.96 * stderr) for sign in (-1, 1))
    return Value(unit * found[key], low, high)


def _ends(interval: Mapping[str, Any], unit: float = 1) -> tuple[float | None, float | None]:
    """Those of an interval; too little text has none."""
    if interval["low"] is None:
        return None, None
    return unit * interval["low"], unit * interval["high"]


def _ratio(row: Row, text: str) -> Value | None:
    found = _text(row, text)
    if row.base is None:
        return Value(1.0) if found else None
    ratio = perplexity_ratio(found, (row.base.get("texts") or {}).get(text) or {})
    if ratio is None:
        return None
    if "paired" not in found:
        return Value(ratio)
    low, high = _ends(found["paired"]["nll"])
    if low is None or high is None:
        return Value(ratio)
    return Value(ratio, math.exp(low), math.exp(high))


def _top1(row: Row, text: str) -> Value | None:
    found = _text(row, text)
    if row.base is None:
        return Value(100.0) if found else None
    return _paired(found, "top1", 100)


def _task(row: Row, task: str) -> Value | None:
    score = (row.values.get("tasks") or {}).get(task)
    if not score or headline(score) is None:
        return None
    if row.base is None:
        return Value(0.0)
    difference = task_difference(score, (row.base.get("tasks") or {}).get(task))
    if difference is None:
        return None
    paired = score.get("paired")
    if paired is None:
        return Value(100 * difference)
    return Value(100 * difference, 100 * paired["low"], 100 * paired["high"])


def size_measures(rows: list[Row]) -> list[Measure]:
    """Megabytes and bits per weight."""
    sizes = [row.values["size"] for row in rows]
    return [
        Measure("size, MB", True, [Value(size["bytes"] / 1e6) for size in sizes]),
        Measure("bits per weight, whole file", True, [Value(size["bits_file"]) for size in sizes]),
        Measure("bits per weight, linears", True, [Value(size["bits_linears"]) for size in sizes]),
    ]


def points_of(row: Row) -> dict[str, Point]:
    """The measured points of a row by what was asked, and of whom: figures are comparable under one key."""
    found = {}
    for speed in speeds_of(row):
        for point in speed["points"] if "points" in speed else [first_point(speed)]:
            if point is not None and "refused" not in point:
                found[point_key(point, speed, row)] = point
    return found


def speeds_of(row: Row) -> Iterable[Mapping[str, Any]]:
    """By the first engine, then by the others."""
    if speed := row.values.get("speed"):
        yield speed
        yield from speed.get("other_engines") or []


def point_key(point: Point, speed: Mapping[str, Any], row: Row) -> str:
    """A point in words, with engine and device."""
    where = f"{speed.get('engine', 'compress')} on {row.run['environment']['device']}"
    return f"batch {point['batch']}, {pattern_of(point)}{ASKED_OF}{where}"


def asked_of(key: str) -> str:
    """Engine and device of a point's words."""
    return key.partition(ASKED_OF)[2]


def speed_ratio(row: Row, key: str) -> Value | None:
    """Decode speed over the original's in the same run, with the quartiles of the rounds."""
    if row.base is None:
        return Value(1.0) if key in points_of(row) else None
    point = points_of(row).get(key)
    beside = points_of(Row(row.label, row.model, row.base, None, row.run)).get(key)
    if point is None or beside is None:
        return None
    together = (row.values["speed"].get("load") or {}).get("together", True)
    if not together:
        ratio = speedup(point, beside, together=False)
        # Of two medians: their spreads add up.
        spread = sum(p["tokens_per_s_iqr"] / p["tokens_per_s"] for p in (point, beside)) / 2
        return Value(ratio, ratio * (1 - spread), ratio * (1 + spread))
    pairs = zip(point["rounds"]["tokens_per_s"], beside["rounds"]["tokens_per_s"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    low, high = np.quantile(ratios, [0.25, 0.75])
    return Value(statistics.median(ratios), float(low), float(high))


def tokens_per_s(row: Row, key: str) -> Value | None:
    """Decode speed of a row at a point, with half the range between quartiles to either side."""
    point = points_of(row).get(key)
    if point is None:
        return None
    speed, half = point["tokens_per_s"], point["tokens_per_s_iqr"] / 2
    return Value(speed, speed - half, speed + half)


def speed_measures(rows: list[Row]) -> dict[str, list[Measure]]:
    """For every point that a row was measured at: tokens/s, and their ratio to the original's."""
    kinds: tuple[tuple[str, Callable[[Row, str], Value | None]], ...] = (
        ("decode tokens/s", tokens_per_s),
        ("decode speed over the original's", speed_ratio),
    )
    return {
        key: [Measure(title, False, [of(row, key) for row in rows]) for title, of in kinds]
        for key in common_points(rows)
    }


def common_points(rows: list[Row]) -> list[str]:
    """All points, those that most candidates were measured at first."""
    counts: dict[str, int] = {}
    for row in rows:
        for key in points_of(row):
            counts[key] = counts.get(key, 0) + (row.base is not None)
    return sorted(counts, key=lambda key: -counts[key])
