"""The tables of the page, whose columns script.js sorts."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from compress.report.gate import failures
from compress.report.measures import points_of, speed_ratio
from compress.report.table import ABSENT, Row, cells, legend_lines

# Characters of a cell from which on its column is one of words.
WORDS = 22
_e = html.escape


def tables(rows: list[Row], limits: Mapping[str, float] | None, runs: list[dict[str, Any]]) -> str:
    """The section of the tables. limits: the gate, None if none was asked for"""
    header, *lines = cells(rows)
    header, lines = ["#", "run", *header[1:]], [[str(i), *row] for i, row in enumerate(lines)]
    if limits is not None:
        header.append("gate")
        for row, line in zip(rows, lines, strict=True):
            failed = [] if row.base is None else failures(row.values, row.base, limits)
            line.append(ABSENT if row.base is None else ", ".join(failed) or "passed")
    legend = "".join(f"<li>{_e(line)}</li>" for line in legend_lines(runs))
    parts = [
        '<section id="tables"><h2>Tables</h2>',
        _sortable("All runs", header, lines),
        f"<ul>{legend}</ul>",
        _speed_table(rows),
        _predicted_table(rows),
        _agreement_table(rows),
        _noise_table(rows),
    ]
    return "".join(parts) + "</section>"


def _sortable(title: str, header: list[str], lines: list[list[str]]) -> str:
    """A table whose columns sort; "" without lines. Columns of figures keep to one line, those of words do
    not."""
    if not lines:
        return ""
    words = [
        max(map(len, column)) > WORDS or i == 1 for i, column in enumerate(zip(*lines, strict=True))
    ]
    classes = [' class="words"' if long else "" for long in words]
    head = "".join(
        f'<th scope="col" aria-sort="none"{own}><button type="button">{_e(name)}</button></th>'
        for name, own in zip(header, classes, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{own}>{_e(cell)}</td>" for cell, own in zip(line, classes, strict=True))
        + "</tr>"
        for line in lines
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_e(title)}"><table>'
        f"<caption>{_e(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _speed_table(rows: list[Row]) -> str:
    lines = []
    for i, row in enumerate(rows):
        for key, point in points_of(row).items():
            ratio = None if row.base is None else speed_ratio(row, key)
            met, share = point.get("meets_limits"), point.get("share_of_roofline")
            lines.append(
                [str(i), row.label, key, f"{point['tokens_per_s']:.1f} ±{point['tokens_per_s_iqr'] / 2:.1f}"]
                + [ABSENT if ratio is None else f"{ratio.value:.2f}x"]
                + [_shown(point.get(name), "{:.2f}") for name in _TIMES]
                + [ABSENT if share is None else f"{share:.0%}", _shown(point.get("goodput_rps"), "{:.2f}")]
                + [ABSENT if met is None else f"{met:.0%}", "+".join(point["kernels"]) or "unquantized"]
            )  # fmt: skip
    header = [
        "#",
        "run",
        "requests",
        "tokens/s",
        "over the original",
        "TTFT ms",
        "ITL ms p50",
        "p90",
    ]
    header += ["p99", "total ms", "of roofline", "goodput, requests/s", "within limits", "kernel"]
    return _sortable("Speed at every point", header, lines)


_TIMES = ("ttft_ms", "itl_ms_p50", "itl_ms_p90", "itl_ms_p99", "e2e_ms")


def _predicted_table(rows: list[Row]) -> str:
    lines = []
    for i, row in enumerate(rows):
        if said := row.values.get("predicted"):
            memory = said.get("memory_bytes")
            lines.append(
                [str(i), row.label, str(said.get("hardware", ABSENT))]
                + [_shown(said.get(name), "{:.2f}") for name in ("itl_ms", "ttft_ms", "tokens_per_s")]
                + [ABSENT if memory is None else f"{memory / 1e6:.0f}", str(said.get("limit", ABSENT))]
            )  # fmt: skip
    header = ["#", "run", "hardware", "ITL ms", "TTFT ms", "tokens/s", "MB of memory", "limited by"]
    return _sortable("Predicted", header, lines)


def _agreement_table(rows: list[Row]) -> str:
    lines = [
        [
            *(str(i), row.label, f"{found['prompts']}", f"{found['generated']}"),
            *(f"{found['median']:g}", f"{found['mean']:.1f}", f"{found['whole']:.0%}"),
        ]
        for i, row in enumerate(rows)
        if (found := row.values.get("agreement"))
    ]
    header = ["#", "run", "prompts", "tokens written", "as the original: median", "mean", "whole"]
    return _sortable("Greedy decoding beside the original's", header, lines)


def _noise_table(rows: list[Row]) -> str:
    lines = []
    for i, row in enumerate(rows):
        for text, found in (row.values.get("texts") or {}).items():
            if noise := found.get("noise"):
                lines.append(
                    [str(i), row.label, text, str(noise.get("dtype", ABSENT))]
                    + [_shown(noise.get(name), "{:.2g}") for name in ("kl", "kl_p99", "kl_p999")]
                    + [_shown(noise.get("top1"), "{:.2%}")]
                )
    header = ["#", "original", "text", "numbers", "KL", "p99", "p99.9", "top-1 agreement"]
    return _sortable("Noise floor: the original in 16 bits beside float32", header, lines)


def _shown(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)
