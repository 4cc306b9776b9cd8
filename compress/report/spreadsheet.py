"""All figures of all rows as CSV: a line a row, the columns named as the keys of metrics.json."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from compress.report.measures import points_of
from compress.report.table import Row


def csv_table(rows: list[Row]) -> str:
    """Every figure at full precision. Lists (rounds, positions) are in metrics.json alone; points of speed
    are named by what was asked."""
    lines = [_line(row) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(row: Row) -> dict[str, Any]:
    line = {
        "name": row.label,
        "row": "original" if row.base is None else "candidate",
        "model": row.run["model"]["name"],
        "fingerprint": row.model,
        "folder": "" if row.base is None else row.run.get("folder", ""),
        "date": row.run["environment"]["date"],
        "device": row.run["environment"]["device"],
    }
    values = {key: found for key, found in row.values.items() if key != "speed"}
    line |= dict(_leaves(values))
    for key, point in points_of(row).items():
        line |= dict(_leaves(point, f"speed.{key}"))
    return line


def _leaves(found: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their numbers, words and truths."""
    if isinstance(found, Mapping):
        for name, inner in found.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(found, str | int | float):
        yield key, found
