"""Speed as a server sees it, and traffic, as figures: Plotly's {"data", "layout"}, plain dicts.

speeds: name -> a speed as compress.measure finds it, the original first; a name has the same colour and
shape in every figure. Points that were refused, and what older runs did not keep, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compress.report.measures import speeds_of
from compress.report.palette import DASHES, MARKERS, PALETTE
from compress.report.table import ABSENT, Row, markdown, plain_markdown, rows_of
from eval.speed import pattern_of
from eval.traffic import Traffic, describe, heat_map, ratio, weigh

Speeds = Mapping[str, Mapping[str, Any]]
Point = Mapping[str, Any]
Figure = dict[str, Any]
# A share of the requests.
NOTHING = "0.0%"


@dataclass(frozen=True)
class Section:
    """A part of a comparison. text: Markdown"""

    title: str
    text: str
    figure: Figure | None = None


def serving_figures(speeds: Speeds) -> list[Figure]:
    """The four figures below."""
    makers = (ttft_figure, itl_figure, total_figure, throughput_figure)
    return [make(speeds) for make in makers]


def ttft_figure(speeds: Speeds) -> Figure:
    """TTFT against tokens in: a line for each name and batch, its bars half the interquartile range."""
    batches = sorted({point["batch"] for _, _, point in _points(speeds)})
    traces = []
    for index, name in enumerate(speeds):
        for batch in batches:
            # The same length in may come with several lengths out.
            found = _by(
                (point["input_length"], point)
                for _, n, point in _points(speeds)
                if n == name and point["batch"] == batch and "least_input" not in point
            )
            if not found:
                continue
            y, spread = (
                [_mean([point.get(key, 0.0) for point in points]) for points in found.values()]
                for key in ("ttft_ms", "ttft_ms_iqr")
            )
            bars = {"type": "data", "array": [s / 2 for s in spread]}
            label = name if len(batches) == 1 else f"{name}, batch {batch}"
            traces.append(
                _line(index, label, list(found), y, dash=batches.index(batch), error_y=bars)
            )
    return _figure(traces, "Time to first token", ("tokens in", "TTFT, ms"), log_x=True)


def itl_figure(speeds: Speeds) -> Figure:
    """ITL against the position in the output, of the longest output measured and of its longest input, for
    each name and batch: the median, and the 90th percentile as a thin line."""
    points = [
        (index, name, point)
        for index, name, point in _points(speeds)
        if "itl_by_position" in point and "least_input" not in point
    ]
    sizes = [(p["output_length"], p["input_length"]) for _, _, p in points]
    longest = max(sizes, default=(0, 0))
    shown = [entry for entry, size in zip(points, sizes, strict=True) if size == longest]
    batches = sorted({point["batch"] for _, _, point in shown})
    traces = []
    for index, name, point in shown:
        found, dash = point["itl_by_position"], batches.index(point["batch"])
        label = name if len(batches) == 1 else f"{name}, batch {point['batch']}"
        x = found["positions"]
        traces.append(_line(index, label, x, found["p50_ms"], dash=dash, mode="lines"))
        thin = _line(index, f"{label}, p90", x, found["p90_ms"], dash=2, mode="lines")
        thin["line"]["width"] = 1
        traces.append(thin | {"showlegend": False})
    title = f"Gap between tokens, {longest[1]} in, {longest[0]} out (thin: 90th percentile)"
    return _figure(traces, title, ("token of the output", "ITL, ms"))


def total_figure(speeds: Speeds) -> Figure:
    """Time from the request to its last token: a box of the rounds for each name and point."""
    boxes: dict[str, dict[str, Any]] = {}
    for index, name, point in _points(speeds):
        rounds = point["rounds"].get("e2e_ms", [])
        box = boxes.setdefault(
            name,
            {
                "type": "box",
                "name": name,
                "x": [],
                "y": [],
                "boxpoints": "all",
                "marker": {"color": _colour(index), "symbol": _marker(index)},
            },
        )
        box["x"] += [f"batch {point['batch']}, {pattern_of(point)}"] * len(rounds)
        box["y"] += rounds
    traces = [box for box in boxes.values() if box["y"]]
    figure = _figure(traces, "Time from request to last token", ("", "ms"), log_y=True)
    figure["layout"]["boxmode"] = "group"
    return figure


def throughput_figure(speeds: Speeds) -> Figure:
    """Tokens a second against the batch, for each name and pattern, its bars half the interquartile range;
    where there are limits also goodput: the tokens of requests within them, over their whole time."""
    points = list(_points(speeds))
    patterns = list(dict.fromkeys(pattern_of(point) for _, _, point in points))
    traces = []
    for index, name in enumerate(speeds):
        for pattern in patterns:
            found = sorted(
                (p for _, n, p in points if n == name and pattern_of(p) == pattern),
                key=lambda p: p["batch"],
            )
            if not found:
                continue
            x = [point["batch"] for point in found]
            label = name if len(patterns) == 1 else f"{name}, {pattern}"
            y = [point["tokens_per_s"] for point in found]
            bars = {
                "type": "data",
                "array": [p.get("tokens_per_s_iqr", 0.0) / 2 for p in found],
            }
            dash = patterns.index(pattern)
            traces.append(_line(index, label, x, y, dash=dash, error_y=bars))
            # Of a mix the tokens of a request are not one number.
            kept = [p for p in found if p.get("goodput_rps") is not None and "least_input" not in p]
            if kept:
                good = [point["goodput_rps"] * point["output_length"] for point in kept]
                x = [point["batch"] for point in kept]
                line = _line(index, f"{label}, goodput", x, good, dash=2)
                line["marker"] |= {"symbol": f"{_marker(index)}-open"}
                traces.append(line)
    return _figure(traces, "Throughput", ("batch", "tokens/s"), log_x=True)


def traffic_figure(traffic: Traffic) -> Figure:
    """The heat map of requests by tokens in and out, in bins of powers of two, in percent of all."""
    found = heat_map(traffic)
    rows = [[100 * count / len(traffic) for count in row] for row in found["requests"]]
    trace = {
        "type": "heatmap",
        "x": [_bin(least) for least in found["output"]],
        "y": [_bin(least) for least in found["input"]],
        "z": [[share or None for share in row] for row in rows],
        "text": [[_share(share) for share in row] for row in rows],
        "texttemplate": "%{text}",
        # Of one hue, so that it reads in grey too.
        "colorscale": [[0.0, "#FFFFFF"], [1.0, PALETTE[0]]],
        "zmin": 0,
        "colorbar": {"title": {"text": "% of requests"}},
    }
    title = f"{traffic.name}: {len(traffic)} requests"
    figure = _figure([trace], title, ("tokens out", "tokens in"))
    for axis in ("xaxis", "yaxis"):
        figure["layout"][axis] |= {"type": "category", "automargin": True}
    return figure


def traffic_report(traffic: Traffic) -> str:
    """Markdown: lengths, arrivals and the heat map as a table in percent, and what was left out."""
    found = describe(traffic)
    header = ["", "mean", "p50", "p90", "p95", "p99", "most"]
    rows = [header] + [
        [f"tokens {end}", *(f"{found[key][column]:.0f}" for column in header[1:])]
        for end, key in (("in", "input"), ("out", "output"))
    ]
    lines = [f"{traffic.name}: {len(traffic)} requests{_left_out(found)}."]
    if found["correlation"] is not None:
        lines.append(
            f"Correlation of tokens in and out, of their logarithms: {found['correlation']:.2f}."
        )
    if arrivals := found["arrivals"]:
        lines.append(
            f"{arrivals['requests_per_s']:.4g} requests/s over {arrivals['seconds']:.4g} s; at most "
            f"{arrivals['peak_second']} in a second and {arrivals['peak_minute']} in a minute, "
            f"{arrivals['burstiness']:.2f} times a mean one."
        )
    counts = heat_map(traffic)
    cells = [["in / out", *map(_bin, counts["output"])]] + [
        [_bin(least), *(_share(100 * count / len(traffic)) for count in row)]
        for least, row in zip(counts["input"], counts["requests"], strict=True)
    ]
    shares = "Percent of the requests by tokens in (rows) and out (columns):"
    told = "\n".join(f"- {line}" for line in lines)
    return "\n\n".join([markdown(rows), told, shares, markdown(cells)]) + "\n"


def _left_out(described: Mapping[str, Any]) -> str:
    """What was left out, in brackets, or nothing."""
    out = described["left_out"]
    told = []
    if out["empty"]:
        told.append(f"{out['empty']} without a token in or out")
    if out["longest"] is not None:
        share = out["longer"] / (out["longer"] + described["requests"])
        told.append(f"{out['longer']} ({share:.1%}) of more than {out['longest']} tokens")
    return f" (left out: {', '.join(told)})" if told else ""


def traffic_sections(traffic: Traffic, runs: list[dict[str, Any]]) -> list[Section]:
    """What the traffic is, and what the measured runs would make of it, each against its own original.

    At every batch that was measured.

    runs: metrics as report.table finds them
    """
    rows = [row for row in rows_of(runs) if row.base is not None]
    weighed = [
        (row.label, speed.get("engine", "compress"), cells)
        for row in rows
        for speed, base in _beside(row)
        for cells in _by_batch(traffic, speed, base)
    ]
    several = len({engine for _, engine, _ in weighed}) > 1
    sections = [Section("Traffic", traffic_report(traffic), traffic_figure(traffic))]
    header = ["", "batch", "covered", "ms a request", "the original's", "tokens/s", "ratio"]
    if weighed:
        table = [header] + [
            [plain_markdown(f"{name} ({engine})" if several else name).replace("|", "\\|"), *cells]
            for name, engine, cells in weighed
        ]
        told = (
            "The measured speeds, weighed by this traffic: TTFT linear in the tokens in between the lengths "
            "measured, ITL linear in the mean context of the decoding; every request in a batch "
            "of its like. Covered: the share of the requests that lie between the sizes measured; only these "
            "count, nothing is extrapolated. Ratio: to the original, within the rounds."
        )
        if all(cells[1] == NOTHING for *_, cells in weighed):
            told = (
                "Nothing is covered: these runs measured no lengths around those of the requests. Run "
                "recipes with speed=patterns, or compress bench ORIGINAL FOLDER traffic=LOG."
            )
        sections.append(Section("Your traffic on these runs", f"{markdown(table)}\n\n{told}\n"))
    return sections


def _beside(row: Row) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """What a row measured by each engine, and what its original did by the same."""
    original = Row(row.label, row.model, row.base or {}, None, row.run)
    bases = {speed.get("engine"): speed for speed in speeds_of(original)}
    for speed in speeds_of(row):
        # Runs of before there were points kept a single one.
        if "points" in speed:
            yield speed, bases.get(speed.get("engine"))


def _by_batch(
    traffic: Traffic, speed: Mapping[str, Any], base: Mapping[str, Any] | None
) -> Iterator[list[str]]:
    for batch in sorted({point["batch"] for point in speed["points"]}):
        found = weigh(speed["points"], traffic, batch)
        beside = weigh(base["points"], traffic, batch) if base and "points" in base else None
        cells = _weighed(found, beside, together=speed["load"].get("together", True))
        original = None if beside is None else beside["time_per_request_ms"]
        cells.insert(3, ABSENT if original is None else f"{original:.1f}")
        yield cells


def _weighed(
    found: Mapping[str, Any], base: Mapping[str, Any] | None, *, together: bool
) -> list[str]:
    cells = [str(found["batch"]), f"{found['covered']:.1%}"]
    if found["time_per_request_ms"] is None:
        return [*cells, *[ABSENT] * 3]
    times = None if base is None else ratio(found, base, together=together)
    return [
        *cells,
        f"{found['time_per_request_ms']:.1f} ±{found['time_per_request_ms_iqr'] / 2:.1f}",
        f"{found['tokens_per_s']:.1f}",
        ABSENT if times is None else f"{times:.2f}x",
    ]


def mixture_table(mixture: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Markdown of a bench over a traffic: the sizes that stand for it, a row for each batch and candidate.

    mixture: {traffic as described, patterns, weighted: folder -> engine -> rows of eval.traffic.mixed}
    results: as report.speed.bench_report
    """
    weighted = mixture["weighted"]
    sizes = "; ".join(
        f"{p['weight']:.1%} {p['input_length']}/{p['output_length']}" for p in mixture["patterns"]
    )
    engines = {engine for found in weighted.values() for engine in found}
    rows = [["traffic", "", "batch", "measured", "ms a request", "tokens/s", "ratio"]]
    original = next(iter(next(iter(weighted.values())).values()))
    for folder, found in weighted.items():
        for engine, of_engine in found.items():
            together = results[folder][engine]["load"]["together"]
            name = folder if len(engines) == 1 else f"{folder} ({engine})"
            for row, base in zip(of_engine, original, strict=True):
                cells = _weighed(row, base, together=together)
                rows.append([mixture["traffic"]["name"], name, *cells])
    traffic = mixture["traffic"]
    told = (
        f"{traffic['requests']} requests of {traffic['name']}{_left_out(traffic)} as "
        f"{len(mixture['patterns'])} sizes, each with the mean lengths of its requests: {sizes}. Ms a "
        "request: end to end, the mean over this mix; tokens/s: all tokens out over the whole time of "
        "their requests; ratio: of these times to the first row, within the rounds. Measured: the share "
        "of the mix that was not refused."
    )
    return f"{markdown(rows)}\n\n- {told}"


def _points(speeds: Speeds) -> Iterator[tuple[int, str, Point]]:
    """Index of the name, name, and every point that was answered."""
    for index, (name, speed) in enumerate(speeds.items()):
        for point in speed.get("points", []):
            if "refused" not in point:
                yield index, name, point


def _by(pairs: Iterator[tuple[int, Point]]) -> dict[int, list[Point]]:
    found: dict[int, list[Point]] = {}
    for key, point in sorted(pairs, key=lambda pair: pair[0]):
        found.setdefault(key, []).append(point)
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _line(
    index: int,
    name: str,
    x: list[Any],
    y: list[Any],
    *,
    dash: int = 0,
    mode: str = "lines+markers",
    **more: Any,
) -> Figure:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": _colour(index), "dash": DASHES[dash % len(DASHES)]},
        "marker": {"color": _colour(index), "symbol": _marker(index)},
        **more,
    }


def _figure(
    traces: list[Figure],
    title: str,
    axes: tuple[str, str],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    layout: Figure = {"title": {"text": title}}
    for axis, text, log in (("xaxis", axes[0], log_x), ("yaxis", axes[1], log_y)):
        layout[axis] = {"title": {"text": text}}
        if log:
            layout[axis]["type"] = "log"
        else:
            layout[axis]["rangemode"] = "tozero"
    if log_x:
        # The lengths and batches that were measured, not powers of ten.
        ticks = sorted({x for trace in traces for x in trace["x"]})
        layout["xaxis"] |= {"tickvals": ticks, "ticktext": [str(tick) for tick in ticks]}
    return {"data": traces, "layout": layout}


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _bin(least: int) -> str:
    return str(least) if least == 1 else f"{least}-{2 * least - 1}"


def _share(percent: float) -> str:
    """Of none nothing, so that the eye finds the rest."""
    if percent == 0:
        return ""
    return "<0.1" if percent < 0.1 else f"{percent:.1f}"
