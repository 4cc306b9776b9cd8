"""The comparison for a terminal: the figures that decide, and what follows from them in words."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.errors import printable
from compress.report.best import answers
from compress.report.gate import failures
from compress.report.measures import (
    Value,
    accuracy_measures,
    common_points,
    speed_ratio,
    tokens_per_s,
)
from compress.report.table import ABSENT, Row, apart, rows_of

# Where no terminal says how wide it is, lines are as long as they need to be.
ENDLESS = 10_000


def comparison(
    runs: list[dict[str, Any]],
    limits: Mapping[str, float] | None = None,
    width: int | None = None,
) -> str:
    """The compact table, what its columns mean, and the answers of every model.

    width: characters a line; None does not break lines
    """
    rows = rows_of(runs)
    printed = io.StringIO()
    console = Console(
        file=printed, width=width or ENDLESS, color_system=None, emoji=False, highlight=False
    )
    console.print(_table(rows, limits))
    for line in [*_legend(rows), *apart(runs)]:
        console.print(Text(f"- {line}"))
    for model, sentences in answers(rows, limits).items():
        console.print(Text(f"\n{model}"))
        for sentence in sentences:
            console.print(Text(f"- {sentence}"))
    lines = printed.getvalue().removesuffix("\n").split("\n")
    return "\n".join(printable(line.rstrip()) for line in lines) + "\n"


def terminal_width(is_terminal: bool) -> int | None:
    """Of the terminal, if there is one."""
    return shutil.get_terminal_size().columns if is_terminal else None


def _table(rows: list[Row], limits: Mapping[str, float] | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", overflow="fold", ratio=3)
    worst = [column for column in _columns(rows) if any(cell != ABSENT for cell in column[1])]
    for title, _ in worst:
        table.add_column(title, justify="right", no_wrap=title != "tokens/s")
    verdicts = [_verdict(row, limits) for row in rows]
    judged = any(verdicts)
    if judged:
        table.add_column("verdict", overflow="fold", ratio=3)
    for i, row in enumerate(rows):
        cells = [Text(row.label), *(Text(column[i]) for _, column in worst)]
        table.add_row(*cells, *([Text(verdicts[i] or ABSENT)] if judged else []))
    return table


def _columns(rows: list[Row]) -> list[tuple[str, list[str]]]:
    measures = accuracy_measures(rows)
    keys = common_points(rows)
    kinds = (("KL", "KL of", "{:.4f}"), ("ppl x", "perplexity over", "{:.3f}"))
    columns = [
        ("MB", [f"{row.values['size']['bytes'] / 1e6:.1f}" for row in rows]),
        ("bits", [f"{row.values['size']['bits_file']:.2f}" for row in rows]),
    ]
    for title, start, form in kinds:
        of_kind = [m.values for m in measures if m.title.startswith(start)]
        columns.append((title, [_worst(row, of_kind, i, max, form) for i, row in enumerate(rows)]))
    lost = [m.values for m in measures if ", points over" in m.title]
    columns.append(("tasks", [_worst(row, lost, i, min, "{:+.1f}") for i, row in enumerate(rows)]))
    speeds = [_speed(row, keys[0]) if keys else ABSENT for row in rows]
    return [*columns, ("tokens/s", speeds)]


def _worst(row: Row, measures: list[list[Value | None]], index: int, pick: Any, form: str) -> str:
    values = [found.value for m in measures if (found := m[index]) is not None]
    if not values or row.base is None:
        return ABSENT
    # Nothing is worse than what is no number.
    return form.format(math.nan if any(map(math.isnan, values)) else pick(values))


def _speed(row: Row, key: str) -> str:
    speed, ratio = tokens_per_s(row, key), speed_ratio(row, key)
    if speed is None:
        return ABSENT
    beside = "" if ratio is None or row.base is None else f" ({ratio.value:.2f}x)"
    return f"{speed.value:.1f}{beside}"


def _verdict(row: Row, limits: Mapping[str, float] | None) -> str | None:
    """What the run says of itself, and whether it passes the gate that is asked for now, else its own."""
    if row.base is None:
        return None
    judged = row.values.get("verdict") or {}
    asked = (judged.get("gate") or {}).get("limits") if limits is None else limits
    said = [judged["text"]] if judged else []
    if asked:
        failed = [n for n, most in asked.items() if failures(row.values, row.base, {n: most})]
        said.append(f"gate FAILED: {', '.join(failed)}" if failed else "gate passed")
    return "; ".join(said) or None


def _legend(rows: list[Row]) -> list[str]:
    texts = dict.fromkeys(text for row in rows for text in row.values.get("texts") or {})
    tasks = dict.fromkeys(task for row in rows for task in row.values.get("tasks") or {})
    keys = common_points(rows)
    lines = ["MB of weight files; bits per weight of the whole file."]
    if texts:
        lines.append(
            "KL in nats per token, and perplexity over the original's: the worst of "
            f"{', '.join(texts)}."
        )
    if tasks:
        lines.append(f"tasks: points over the original, the worst of {', '.join(tasks)}.")
    if keys:
        lines.append(
            f"tokens/s: decoding, {keys[0]}; (x) over the original in the same run, whose speed differs "
            "from run to run; shown is the newest."
        )
    return [*lines, "Everything else: --out FOLDER."]
