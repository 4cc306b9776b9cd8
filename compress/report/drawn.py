"""Figures of report.serving as one PNG: the few kinds of traces that they have, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Plotly's names in matplotlib's.
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "x": "X",
    "star": "*",
    "triangle-down": "v",
    "cross": "P",
}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
# More entries of a legend would cover the picture: it goes beside; more than so many have no room there.
INSIDE, BESIDE = 8, 24


def draw_figures(figures: Sequence[Mapping[str, Any]], target: Path, columns: int = 2) -> None:
    """Write the PNG ``target``: the figures with data, ``columns`` in a row."""
    figures = [figure for figure in figures if figure["data"]]
    columns = max(1, min(columns, len(figures)))
    rows = -(-len(figures) // columns)
    # A figure of its own, not pyplot's: nothing is left behind in the process.
    picture = Figure(figsize=(7.5 * columns, 5 * max(1, rows)), dpi=120)
    for number, figure in enumerate(figures, 1):
        axes = picture.add_subplot(rows, columns, number)
        _draw(axes, figure)
    picture.tight_layout()
    picture.savefig(target, format="png", bbox_inches="tight")


def _draw(axes: Axes, figure: Mapping[str, Any]) -> None:
    layout, traces = figure["layout"], figure["data"]
    axes.set_title(layout["title"]["text"], fontsize=11)
    axes.set_xlabel(layout["xaxis"]["title"]["text"])
    axes.set_ylabel(layout["yaxis"]["title"]["text"])
    for trace in traces:
        if trace["type"] == "scatter":
            _line(axes, trace)
        elif trace["type"] == "heatmap":
            _heat_map(axes, trace)
    boxes = [trace for trace in traces if trace["type"] == "box"]
    if boxes:
        _boxes(axes, boxes)
    if traces and traces[0]["type"] != "heatmap":
        _scale(axes, layout)
        axes.grid(alpha=0.3)
        _legend(axes)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= INSIDE:
        axes.legend(fontsize=8)
        return
    title = f"the first {BESIDE} of {len(labels)}" if len(labels) > BESIDE else None
    first = slice(BESIDE)
    axes.legend(
        handles[first],
        labels[first],
        title=title,
        fontsize=7,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
    )


def _scale(axes: Axes, layout: Mapping[str, Any]) -> None:
    if layout["yaxis"].get("type") == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if layout["xaxis"].get("type") == "log":
        axes.set_xscale("log")
        axes.set_xticks(layout["xaxis"]["tickvals"], layout["xaxis"]["ticktext"])
        axes.set_xticks([], minor=True)


def _line(axes: Axes, trace: Mapping[str, Any]) -> None:
    marked = "markers" in trace["mode"]
    symbol = trace["marker"]["symbol"]
    axes.errorbar(
        trace["x"],
        trace["y"],
        yerr=trace["error_y"]["array"] if "error_y" in trace else None,
        color=trace["line"]["color"],
        linestyle=DASHES[trace["line"]["dash"]],
        linewidth=trace["line"].get("width", 1.5),
        marker=MARKERS[symbol.removesuffix("-open")] if marked else "",
        markerfacecolor="none" if symbol.endswith("-open") else trace["line"]["color"],
        capsize=3,
        # One that starts with _ is not in the legend.
        label=trace["name"] if trace.get("showlegend", True) else "_",
    )


def _boxes(axes: Axes, traces: Sequence[Mapping[str, Any]]) -> None:
    """Boxes of one x side by side, a colour each."""
    places = list(dict.fromkeys(x for trace in traces for x in trace["x"]))
    width = 0.8 / len(traces)
    for index, trace in enumerate(traces):
        values: dict[str, list[float]] = {}
        for x, y in zip(trace["x"], trace["y"], strict=True):
            values.setdefault(x, []).append(y)
        at = [places.index(x) + (index - (len(traces) - 1) / 2) * width for x in values]
        colour = trace["marker"]["color"]
        drawn = axes.boxplot(
            list(values.values()),
            positions=at,
            widths=0.8 * width,
            whis=(0, 100),
            patch_artist=True,
            manage_ticks=False,
        )
        for box in drawn["boxes"]:
            box.set(facecolor=colour, alpha=0.5, edgecolor=colour)
        for line in (*drawn["medians"], *drawn["whiskers"], *drawn["caps"]):
            line.set_color(colour)
        # A name for the legend: a box has none.
        marker = MARKERS[trace["marker"]["symbol"]]
        for place, found in zip(at, values.values(), strict=True):
            axes.plot([place] * len(found), found, marker, color=colour, markersize=3)
        axes.plot([], [], marker, color=colour, label=trace["name"])
    axes.set_xticks(range(len(places)), places, rotation=20, ha="right")


def _heat_map(axes: Axes, trace: Mapping[str, Any]) -> None:
    shares = np.array(
        [[np.nan if z is None else z for z in row] for row in trace["z"]], dtype=float
    )
    colours = LinearSegmentedColormap.from_list("scale", trace["colorscale"])
    image = axes.imshow(shares, cmap=colours, aspect="auto", origin="lower", vmin=trace["zmin"])
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label(trace["colorbar"]["title"]["text"])
    axes.set_xticks(range(len(trace["x"])), trace["x"], rotation=45, ha="right")
    axes.set_yticks(range(len(trace["y"])), trace["y"])
    dark = np.nanmax(shares) / 2
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            colour = "white" if share > dark else "black"
            text = trace["text"][row][column]
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
