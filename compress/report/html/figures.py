"""Figures of a single run from what its stages reported: plain dicts {data, layout} as Plotly reads them.

Colours of text, grid and background are the page's: they are not set here. What figures of several runs show
is chosen on the page, and drawn there.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compress.report.blocks import errors_of
from compress.report.palette import PALETTE

Figure = dict[str, Any]
BLUE, ORANGE, GREEN, PURPLE = PALETTE[:4]
SHADES = "Cividis"
# Heads are names, not places on a scale.
HEADS = {"type": "category"}


def figures_of(run: Mapping[str, Any]) -> list[Figure]:
    """All figures that there is something to show in. run: a metrics.json"""
    compression, candidate = run.get("compression") or {}, run["candidate"]
    makers: list[tuple[Any, Callable[[Any], Iterable[Figure]]]] = [
        (compression.get("blocks"), _errors),
        (compression.get("search"), _bits),
        (compression.get("outliers"), _outliers),
        (compression.get("prune"), _pruning),
        (compression.get("distill"), _distillation),
        (candidate.get("context"), _context),
    ]
    return [figure for found, make in makers if found for figure in make(found)]


def plain(text: str) -> str:
    """A name in a figure: Plotly reads some tags."""
    return html.escape(text, quote=False)


def last_part(name: str) -> str:
    """Of a linear's name, without what all have."""
    return plain(name.rpartition(".")[2].removesuffix("_proj"))


def figure(title: str, data: list[dict[str, Any]], x: str, y: str, **layout: Any) -> Figure:
    """A figure with a title and axes in words; ``layout`` goes over these."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, "automargin": True}}
    for axis in axes:
        axes[axis] |= layout.pop(axis, {})
    return {"data": data, "layout": {"title": {"text": title}, **axes, **layout}}


def heat(
    rows: list[list[float | None]], labels: list[str], unit: str, *, log: bool = False
) -> dict[str, Any]:
    """A heat map: a row a label, a column a block. log: shades go by the logarithm, hovering shows figures"""
    shown = [[_log(v) for v in row] for row in rows] if log else rows
    ticks = _ticks([v for row in shown for v in row if v is not None]) if log else {}
    return {
        "type": "heatmap",
        "z": shown,
        "customdata": rows,
        "y": labels,
        "x": list(range(len(rows[0]))),
        "colorscale": SHADES,
        "reversescale": True,
        "colorbar": {"title": {"text": unit, "side": "right"}, **ticks},
        "hovertemplate": "block %{x}, %{y}: %{customdata:.4g}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }


def _ticks(logarithms: list[float]) -> dict[str, Any]:
    """Round figures (1, 2, 5 and so on) between the least and the largest."""
    if not logarithms:
        return {}
    low, high = min(logarithms), max(logarithms)
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 3 else (1,)
    figures = [step * 10.0**power for power in powers for step in steps]
    inside = [x for x in figures if low - 1e-6 <= math.log10(x) <= high + 1e-6]
    return {"tickvals": [math.log10(x) for x in inside], "ticktext": [f"{x:g}" for x in inside]}


def _log(value: float | None) -> float | None:
    return math.log10(value) if value else None


def _errors(blocks: list[Mapping[str, Any]]) -> Iterable[Figure]:
    linears, rows = errors_of(blocks)
    if not linears:
        return
    yield figure(
        "Relative output error of every linear",
        [heat(rows, [last_part(name) for name in linears], "relative error", log=True)],
        "block",
        "",
        yaxis={"autorange": "reversed"},
    )


def _bits(search: Mapping[str, Any]) -> Iterable[Figure]:
    groups = list(search["groups"].values())
    names = list(dict.fromkeys(tuple(group["linears"]) for group in groups))
    rows: list[list[float | None]] = [
        [None] * (1 + max(group["block"] for group in groups)) for _ in names
    ]
    for group in groups:
        rows[names.index(tuple(group["linears"]))][group["block"]] = group["bits"]
    labels = [", ".join(map(last_part, linears)) for linears in names]
    shown = heat(rows, labels, "bits")
    widths = sorted({int(bits) for group in groups for bits in group["kl"]})
    shown |= {"zmin": widths[0], "zmax": widths[-1], "texttemplate": "%{z}"}
    shown["colorbar"] |= {"tickvals": widths}
    yield figure(
        f"Bits of the linears: {search['average_bits']:.2f} on average, {search['megabytes']:.1f} MB",
        [shown],
        "block",
        "",
        yaxis={"autorange": "reversed"},
    )


def _outliers(outliers: Mapping[str, Any]) -> Iterable[Figure]:
    entries = list(outliers["inputs"].values())
    labels = [", ".join(map(last_part, entry["readers"])) for entry in entries]
    shares = [[100 * x["columns"] / e["width"] for x in e["layers"]] for e in entries]
    largest = [[x["largest"] for x in e["layers"]] for e in entries]
    for title, rows, unit in (
        (f"Input columns with |x| of {outliers['threshold']:g} or more", shares, "%"),
        ("Largest |x| of the inputs", largest, "|x|"),
    ):
        yield figure(
            title,
            [heat(rows, labels, unit, log=True)],
            "block",
            "",
            yaxis={"autorange": "reversed"},
        )


def _line(name: str, x: Iterable[Any], y: Iterable[Any], index: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {
            "color": (BLUE, ORANGE, GREEN, PURPLE)[index],
            "dash": ("solid", "dash", "dot", "dashdot")[index],
        },
        "marker": {"symbol": ("circle", "square", "diamond", "triangle-up")[index]},
    }


def _pruning(report: Mapping[str, Any]) -> Iterable[Figure]:
    survey, shape, blocks = report["survey"], report["shape"], report["blocks"]
    kept = {block["block"] for block in blocks}
    influence = list(enumerate(survey["influence"]))
    log = {"type": "log"}
    yield figure(
        "What every block changes: those that stay, and those that are gone",
        [
            {
                "type": "bar",
                "name": name,
                "x": [i for i, _ in influence if (i in kept) == stays],
                "y": [size for i, size in influence if (i in kept) == stays],
                "marker": {"color": color, "pattern": {"shape": "" if stays else "/"}},
            }
            for name, stays, color in (("stays", True, BLUE), ("gone", False, ORANGE))
        ],
        "block",
        "influence, 1 - cos(in, out)",
        yaxis=log,
    )
    yield _heads(survey["heads"], blocks)
    ranked, stay = sorted(survey["channels"], reverse=True), shape["after"]["hidden"]
    yield figure(
        f"Channels of the residual stream, sorted: {stay} of {len(ranked)} stay",
        [_line("channels", range(len(ranked)), ranked, 0) | {"mode": "lines"}],
        "channel",
        "size behind the norms",
        yaxis=log,
        shapes=[_mark(stay)] if stay < len(ranked) else [],
    )
    yield _neurons(survey["neurons"], shape)
    series = [("attention", [b["errors"]["attention"] for b in blocks])]
    series += [
        ("mlp", [b["errors"]["mlp"] for b in blocks]),
        ("stream", [b["drift"] for b in blocks]),
    ]
    places = [block["block"] for block in blocks]
    yield figure(
        f"Errors against the original (refit: {plain(str(report['refit']))})",
        [_line(name, places, found, i) for i, (name, found) in enumerate(series)],
        "block",
        "relative squared error",
        yaxis=log,
    )
    if report["candidates"]:
        yield _trials(report["candidates"], shape["after"])


def _mark(place: float) -> dict[str, Any]:
    """A vertical line: what is right of it is gone."""
    line = {"color": ORANGE, "dash": "dash"}
    return {
        "type": "line",
        "yref": "paper",
        "x0": place,
        "x1": place,
        "y0": 0,
        "y1": 1,
        "line": line,
    }


def _heads(sizes: list[list[float]], blocks: list[Mapping[str, Any]]) -> Figure:
    shares = [[size / (max(row) or 1) for size in row] for row in sizes]
    by_head = [list(column) for column in zip(*shares, strict=True)]
    shown = heat(by_head, [str(head) for head in range(len(by_head))], "share of the largest")
    shown["hovertemplate"] = "block %{x}, head %{y}: %{customdata:.3f}<extra></extra>"
    gone = [
        (block["block"], head)
        for block in blocks
        for head in range(len(by_head))
        if head not in block["heads"]
    ]
    crosses = {
        "type": "scatter",
        "mode": "markers",
        "name": "gone",
        "x": [block for block, _ in gone],
        "y": [str(head) for _, head in gone],
        "marker": {"symbol": "x", "color": ORANGE},
        "hoverinfo": "skip",
    }
    title = "Outputs of the attention heads, over the block's largest (crosses: gone)"
    return figure(title, [shown, *([crosses] if gone else [])], "block", "query head", yaxis=HEADS)


def _neurons(neurons: list[list[float]], shape: Mapping[str, Any]) -> Figure:
    shares = [[x / (max(row) or 1) for x in sorted(row, reverse=True)] for row in neurons]
    columns = [list(column) for column in zip(*shares, strict=True)]
    labels = [f"{(i + 1) / len(columns):.2f}" for i in range(len(columns))]
    shown = heat(columns, labels, "over the largest", log=True)
    kept = shape["after"]["mlp"] / shape["before"]["mlp"]
    return figure(
        f"Outputs of the neurons, sorted, over the block's largest: the first {kept:.0%} stay",
        [shown],
        "block",
        "share of the neurons",
    )


def _trials(trials: list[Mapping[str, Any]], after: Mapping[str, int]) -> Figure:
    taken = [all(trial[axis] == size for axis, size in after.items()) for trial in trials]
    names = [
        f"{t['layers']} layers, {t['heads']}/{t['kv_heads']} heads, mlp {t['mlp']}, hidden {t['hidden']}"
        for t in trials
    ]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [trial["kl"] for trial in trials],
        "y": names,
        "marker": {
            "color": [BLUE if own else "#999999" for own in taken],
            "pattern": {"shape": ["" if own else "/" for own in taken]},
        },
    }
    return figure("Shapes that were tried (blue: taken)", [bars], "KL on trial, nats per token", "")


def _distillation(report: Mapping[str, Any]) -> Iterable[Figure]:
    curve, held_out = report["curve"], report["held_out"]
    per_step = report["tokens"] / report["steps"]
    tokens, held = [p["tokens"] for p in curve], [per_step * p["step"] for p in held_out]
    kept = report["held_out_top_k"]
    name = "held out" if kept is None else f"held out, of {kept} tokens: a lower bound"
    series = [_line(name, held, [p["kl"] for p in held_out], 0)]
    if any(point.get("kl") for point in curve):
        series.append(_line("training", tokens, [p["kl"] for p in curve], 1) | {"mode": "lines"})
    title = "Distillation: divergence from the original"
    yield figure(title, series, "tokens", "KL, nats per token", yaxis={"type": "log"})


def _context(context: Mapping[str, Any]) -> Iterable[Figure]:
    found = context["positions"]
    size = context["window"] // len(found["bucket_kl"])
    places = [(i + 0.5) * size for i in range(len(found["bucket_kl"]))]
    line = _line("KL", places, found["bucket_kl"], 0)
    line["error_y"] = {"array": found["bucket_kl_stderr"]}
    title = f"KL by position, {plain(str(context['text']))}"
    yield figure(title, [line], "position", "KL, nats per token")
    for name, rows in context.get("heads", {}).items():
        by_head = [list(column) for column in zip(*rows, strict=True)]
        shown = heat(by_head, [str(head) for head in range(len(by_head))], "error", log=True)
        yield figure(
            f"Relative squared error of the cache: {plain(name)}",
            [shown],
            "layer",
            "head",
            yaxis=HEADS,
        )
