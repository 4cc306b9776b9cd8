"""What the page draws and sorts, as one JSON value: the rows, what they are compared by, their points of
speed, their errors by block, and the figures of each run."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from compress.report.html.figures import figures_of, plain
from compress.report.measures import (
    Measure,
    Value,
    accuracy_measures,
    asked_of,
    common_points,
    points_of,
    size_measures,
    speed_measures,
)
from compress.report.palette import PALETTE
from compress.report.table import Row, cells, first_point
from eval.speed import pattern_of

# Sections of a recipe that say how something is measured, not what is made.
MEASURING = ("model", "eval", "speed", "context", "device", "gate")
# Significant digits of what is drawn: metrics.json has the rest.
DIGITS = 5
# What a point of speed is drawn by.
DRAWN = (
    "batch", "input_length", "output_length", "ttft_ms", "ttft_ms_iqr", "tokens_per_s", "tokens_per_s_iqr",
    "itl_ms_p50", "itl_by_position",
)  # fmt: skip


def page_data(rows: list[Row]) -> dict[str, Any]:
    """Everything that script.js reads. Numbers are rounded, what is no number is null."""
    lines = cells(rows)
    figures = {str(i): figures_of(row.run) for i, row in enumerate(rows) if row.base is not None}
    return {
        "rows": [_row(row, lines[0], line) for row, line in zip(rows, lines[1:], strict=True)],
        "accuracy": [_measure(measure) for measure in accuracy_measures(rows)],
        "size": [_measure(measure) for measure in size_measures(rows)],
        "speed": {
            key: [_measure(measure) for measure in found]
            for key, found in speed_measures(rows).items()
        },
        "points": {key: [_point(row, key) for row in rows] for key in common_points(rows)},
        "blocks": [_block_kl(row) for row in rows],
        "predicted": [_predicted(row) for row in rows],
        "figures": {key: rounded(found) for key, found in figures.items() if found},
        # Without black, which is the originals', and yellow, which is pale.
        "colors": PALETTE[:6],
    }


def script_json(data: Any) -> str:
    """JSON that may stand between script tags, whatever names are in it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _row(row: Row, header: list[str], line: list[str]) -> dict[str, Any]:
    figures = [
        f"{title}: {cell}"
        for title, cell in zip(header[1:], line[1:], strict=True)
        if cell not in ("-", "")
    ]
    recipe = [] if row.base is None else recipe_lines(row.run["recipe"])
    return {
        "label": row.label,
        "model": row.model,
        "original": row.base is None,
        "hover": "<br>".join(
            [f"<b>{plain(row.label)}</b>", *map(plain, _wrapped(figures)), *map(plain, recipe)]
        ),
    }


def _wrapped(figures: list[str]) -> list[str]:
    return textwrap.wrap("; ".join(figures), 100)


def recipe_lines(recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe makes, a line a section, without what is not set."""
    lines = []
    for key, value in recipe.items():
        if key in MEASURING or value in (None, {}, []):
            continue
        text = yaml.safe_dump(_set(value), default_flow_style=True, sort_keys=False, width=math.inf)
        text = text.strip().removesuffix("...").strip()
        lines += textwrap.wrap(f"{key}: {text}", 100, subsequent_indent="  ")
    return lines


def _set(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _set(inner) for key, inner in value.items() if inner is not None}
    return value


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        "title": plain(measure.title),
        "less": measure.less,
        "log": measure.log,
        **_columns(measure.values),
    }


def _columns(values: list[Value | None]) -> dict[str, list[float | None]]:
    return {
        "values": [None if v is None else _number(v.value) for v in values],
        "low": [None if v is None else _number(v.low) for v in values],
        "high": [None if v is None else _number(v.high) for v in values],
    }


def _number(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def rounded(found: Any) -> Any:
    """Numbers to DIGITS; what is no finite number is null."""
    if isinstance(found, Mapping):
        return {key: rounded(inner) for key, inner in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(inner) for inner in found]
    return _number(found) if isinstance(found, float) else found


def _point(row: Row, key: str) -> dict[str, Any] | None:
    point = points_of(row).get(key)
    if point is None:
        return None
    return rounded(
        {name: point[name] for name in DRAWN if name in point}
        | {"e2e_ms": (point.get("rounds") or {}).get("e2e_ms")}
        | {"pattern": pattern_of(point), "mix": "least_input" in point, "of": asked_of(key)}
    )


def _block_kl(row: Row) -> dict[str, list[float]] | None:
    found = (row.run.get("compression") or {}).get("block_kl")
    return rounded(found) if found and row.base is not None else None


def _predicted(row: Row) -> dict[str, Any] | None:
    """What ``compress plan`` said beside what was measured at the first point."""
    said = row.values.get("predicted")
    if not said:
        return None
    point = first_point(row.values.get("speed")) or {}
    measured = {
        "itl_ms": point.get("itl_ms_p50"),
        "ttft_ms": point.get("ttft_ms"),
        "tokens_per_s": point.get("tokens_per_s"),
    }
    return rounded({"said": said, "measured": measured})
