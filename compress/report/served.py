"""What serving engines made of the checkpoints: whether they agree with our reader, and how fast they are.

The section ``served`` of a row in metrics.json is ENGINE/FORMAT -> {engine, version, conditions, export,
device, date, agreement, client, points}, as eval.engines.serve_check writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compress.report.palette import DASHES, MARKERS, PALETTE
from compress.report.serving import Figure, Section
from compress.report.table import ABSENT, Row, markdown, plain_markdown, rows_of

Entry = Mapping[str, Any]
Point = Mapping[str, Any]


def served_sections(runs: list[dict[str, Any]]) -> list[Section]:
    """A section of all runs that were served; none if none was. runs: metrics as report.table finds them"""
    rows = [row for row in rows_of(runs) if row.values.get("served")]
    if not rows:
        return []
    return [Section("Served", served_report(rows), served_figure(rows))]


def served_report(rows: list[Row]) -> str:
    """Markdown: what engines compute, and how fast they answer. rows: those that were served"""
    text = f"{agreement_table(rows)}\n\n"
    if any(entry["points"] for _, entry in _entries(rows)):
        text += f"{served_table(rows)}\n"
    return text


def agreement_table(rows: list[Row]) -> str:
    """Markdown: a line for each checkpoint and engine, and in words what is compared."""
    lines = [
        ["", "format", "engine", "agrees", "to ours", "to original", "ours to original", "rule"]
    ]
    for row, entry in _entries(rows):
        found = entry["agreement"]
        if "error" in found:
            lines.append([*_names(row, entry), "NO", *[ABSENT] * 3, found["error"]])
            continue
        distances = [found[key] for key in ("distance", "to_original", "ours_to_original")]
        lines.append(
            [
                *_names(row, entry),
                "yes" if found["agrees"] else "NO",
                *(f"{value:.4f}" for value in distances),
                found["rule"],
            ]
        )
    told = (
        "- Mean |difference| of the log-probabilities of the same prompt tokens, in nats: engine to our "
        "reader of the exported files, engine to the original, our reader to the original."
    )
    return f"{_table(lines)}\n\n{told}"


def served_table(rows: list[Row]) -> str:
    """Markdown: a line for each checkpoint, engine and load."""
    header = ["", "format", "engine", "in/out", "at a time", "requests", "lost", "requests/s"]
    lines = [[*header, "tokens/s", "TTFT ms p50", "p99", "ITL ms p50", "p99"]]
    clients, conditions, devices = set(), dict[str, str](), set()
    for row, entry in _entries(rows):
        for point in entry["points"]:
            clients.add(entry["client"])
            devices.add(entry["device"])
            conditions[entry["engine"]] = entry["conditions"]
            lines.append([*_names(row, entry), *_cells(point)])
    told = (
        f"- By {', '.join(sorted(clients))}: random tokens, every request as long as asked, as many at a "
        "time as said. tokens/s: of all answers over the time of the load, the median of its rounds, (x) "
        "over the original's in the same rounds, in turns. TTFT: request to first token; ITL: mean gap "
        "between the tokens of a request after it; percentiles over requests. Lost: ended in an error, or "
        f"short of tokens. On {', '.join(sorted(devices))}; "
        f"{'; '.join(f'{engine}: {told}' for engine, told in conditions.items())}."
    )
    return f"{_table(lines)}\n\n{told}"


def served_figure(rows: list[Row]) -> Figure | None:
    """Tokens a second against requests at a time, of the longest size that was asked at several."""
    points = [point for _, entry in _entries(rows) for point in entry["points"]]
    at: dict[tuple[int, int], set[int]] = {}
    for point in points:
        at.setdefault(_size(point), set()).add(point["concurrency"])
    several = [size for size, found in at.items() if len(found) > 1]
    if not several:
        return None
    size = max(several, key=sum)
    traces = []
    for index, row in enumerate(rows):
        for of_row, entry in enumerate(row.values["served"].values()):
            found = sorted(
                (p for p in entry["points"] if _size(p) == size), key=lambda p: p["concurrency"]
            )
            if not found:
                continue
            colour = PALETTE[index % len(PALETTE)]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": ", ".join(_names(row, entry)),
                    "x": [point["concurrency"] for point in found],
                    "y": [point["tokens_per_s"] for point in found],
                    "line": {"color": colour, "dash": DASHES[of_row % len(DASHES)]},
                    "marker": {"color": colour, "symbol": MARKERS[index % len(MARKERS)]},
                }
            )
    ticks = sorted(at[size])
    return {
        "data": traces,
        "layout": {
            "title": {"text": f"Served, {size[0]} tokens in, {size[1]} out"},
            "xaxis": {
                "title": {"text": "requests at a time"},
                "type": "log",
                "tickvals": ticks,
                "ticktext": [str(tick) for tick in ticks],
            },
            "yaxis": {"title": {"text": "tokens/s"}, "rangemode": "tozero"},
        },
    }


def _entries(rows: list[Row]) -> Iterator[tuple[Row, Entry]]:
    for row in rows:
        for entry in row.values["served"].values():
            yield row, entry


def _names(row: Row, entry: Entry) -> list[str]:
    return [row.label, entry["export"], f"{entry['engine']} {entry['version']}"]


def _size(point: Point) -> tuple[int, int]:
    return point["input_length"], point["output_length"]


def _cells(point: Point) -> list[str]:
    rate, ratio = f"{point['tokens_per_s']:.1f}", point.get("over_original")
    if ratio is not None:
        rate += f" ({ratio:.2f}x)"
    times = [point[key][share] for key in ("ttft_ms", "itl_ms") for share in ("p50", "p99")]
    return [
        f"{point['input_length']}/{point['output_length']}",
        str(point["concurrency"]),
        str(point["requests"]),
        str(point["lost"]),
        f"{point['requests_per_s']:.2f}",
        rate,
        *(ABSENT if value is None else f"{value:.0f}" for value in times),
    ]


def _table(lines: list[list[str]]) -> str:
    return markdown([[plain_markdown(cell).replace("|", "\\|") for cell in line] for line in lines])
