"""All figures of all rows as CSV: a line a row, the columns named as the keys of metrics.json."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from compress.report.measures import points_of, speeds_of
from compress.report.table import Row


def csv_table(rows: list[Row]) -> str:
    """Every figure at full precision. Lists (rounds, positions) are in metrics.json alone; points of speed
    are named by what was asked, what is of no point (seconds to open, for one) by the engine."""
    lines = [_line(row) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {
        "name": row.label,
        "row": "original" if row.base is None else "candidate",
        "model": row.run["model"]["name"],
        "fingerprint": row.model,
        "folder": "" if row.base is None else row.run.get("folder", ""),
        "date": row.run["environment"]["date"],
        "device": row.run["environment"]["device"],
    }
    values = {key: found for key, found in row.values.items() if key != "speed"}
    line = dict(_leaves(line)) | dict(_leaves(values))
    for speed in speeds_of(row):
        if "points" in speed:
            kept = {k: v for k, v in speed.items() if k not in ("load", "points", "other_engines")}
            line |= dict(_leaves(kept, f"speed.{speed.get('engine', 'compress')}"))
    for key, point in points_of(row).items():
        line |= dict(_leaves(point, f"speed.{key}"))
    return line


def _plain(text: str) -> str:
    """A name that a spreadsheet takes for no formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _leaves(found: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their numbers, words and truths."""
    if isinstance(found, Mapping):
        for name, inner in found.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(found, str | int | float):
        yield key, _plain(found) if isinstance(found, str) else found
