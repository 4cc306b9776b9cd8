"""The picture and the table of a pruning: what mattered in the original, and what was cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress.report.table import markdown

PICTURE, TABLE = "pruning.png", "pruning.md"
# Readable by colour-blind people (Okabe and Ito): what stays, what goes.
STAYS, GOES = "#0072B2", "#D55E00"


def draw_pruning(report: Mapping[str, Any], target: Path) -> None:
    """Write the PNG ``target``: influence of the blocks, sizes of heads, neurons and channels, errors of
    what is left.

    report: what the prune stage reports
    """
    figure = Figure(figsize=(13, 8), dpi=130, layout="constrained")
    axes = figure.subplots(2, 3)
    survey = report["survey"]
    _draw_layers(axes[0, 0], report)
    _draw_heads(axes[0, 1], figure, report)
    _draw_neurons(axes[0, 2], figure, survey["neurons"], report["shape"])
    _draw_channels(axes[1, 0], survey["channels"], report["shape"]["after"]["hidden"])
    _draw_errors(axes[1, 1], report["blocks"], report["refit"])
    _draw_candidates(axes[1, 2], report["candidates"], report["shape"]["after"])
    figure.savefig(target, format="png")


def _draw_layers(axes: Axes, report: Mapping[str, Any]) -> None:
    influence = report["survey"]["influence"]
    kept = {block["block"] for block in report["blocks"]}
    colors = [STAYS if i in kept else GOES for i in range(len(influence))]
    axes.bar(range(len(influence)), influence, color=colors)
    axes.set_yscale("log")
    _label(axes, "Blocks (orange: gone)", "block", "influence, 1 - cos(in, out)")


def _draw_heads(axes: Axes, figure: Figure, report: Mapping[str, Any]) -> None:
    sizes = np.array(report["survey"]["heads"])
    gone = [
        (head, block["block"])
        for block in report["blocks"]
        for head in range(sizes.shape[1])
        if head not in block["heads"]
    ]
    if gone:
        heads, blocks = zip(*gone, strict=True)
        axes.scatter(heads, blocks, color=GOES, marker="x", s=20, label="gone")
        axes.legend(loc="upper right")
    image = axes.imshow(sizes / sizes.max(1, keepdims=True), aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axes, label="share of the block's largest")
    _label(axes, "Outputs of attention heads", "query head", "block")


def _draw_neurons(
    axes: Axes, figure: Figure, neurons: list[list[float]], shape: Mapping[str, Any]
) -> None:
    sizes = np.array(neurons)[:, ::-1]
    image = axes.imshow(
        np.log10(np.maximum(sizes / sizes[:, :1], 1e-6)), aspect="auto", cmap="viridis",
        extent=(0, 1, len(sizes) - 0.5, -0.5),
    )  # fmt: skip
    kept = shape["after"]["mlp"] / shape["before"]["mlp"]
    if kept < 1:
        axes.axvline(kept, color=GOES, label=f"{shape['after']['mlp']} stay")
        axes.legend(loc="lower left")
    figure.colorbar(image, ax=axes, label="log10, over the block's largest")
    _label(axes, "Outputs of neurons, sorted", "share of the neurons", "block")


def _draw_channels(axes: Axes, channels: list[float], kept: int) -> None:
    sizes = sorted(channels, reverse=True)
    axes.plot(range(len(sizes)), sizes, color=STAYS)
    if kept < len(sizes):
        axes.axvline(kept, color=GOES, label=f"{kept} stay")
        axes.legend()
    axes.set_yscale("log")
    _label(axes, "Channels of the residual stream, sorted", "channel", "size behind the norms")


def _draw_errors(axes: Axes, blocks: list[Mapping[str, Any]], refit: str) -> None:
    places = [block["block"] for block in blocks]
    for name, marker in (("attention", "o"), ("mlp", "s")):
        axes.plot(places, [b["errors"][name] for b in blocks], marker=marker, ms=3, label=name)
    axes.plot(places, [b["drift"] for b in blocks], marker="^", ms=3, label="stream")
    axes.set_yscale("log")
    axes.legend()
    _label(axes, f"Errors against the original (refit: {refit})", "block", "relative squared error")


def _draw_candidates(axes: Axes, trials: list[Mapping[str, Any]], after: Mapping[str, int]) -> None:
    if not trials:
        axes.text(0.5, 0.5, "one shape was asked for", ha="center", va="center")
        axes.set_axis_off()
        return
    same = [all(t[axis] == size for axis, size in after.items()) for t in trials]
    axes.barh(
        [_shape(t) for t in trials], [t["kl"] for t in trials],
        color=[STAYS if chosen else "#999999" for chosen in same],
    )  # fmt: skip
    axes.set_xlabel("KL on trial, nats per token")
    axes.set_title("Shapes that were tried (blue: taken)")


def _shape(sizes: Mapping[str, int]) -> str:
    return (
        f"{sizes['layers']} layers\n{sizes['heads']}/{sizes['kv_heads']} heads\n"
        f"mlp {sizes['mlp']}, hidden {sizes['hidden']}"
    )


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x in ("block", "query head"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def pruning_table(report: Mapping[str, Any]) -> str:
    """Markdown: sizes before and after, and the shapes that were tried."""
    before, after = report["shape"]["before"], report["shape"]["after"]
    rows = [["", "original", "pruned"]]
    rows += [[axis, str(before[axis]), str(after[axis])] for axis in before]
    for name, key in (("parameters", "parameters"), ("of the blocks", "block_parameters")):
        old, new = report[key]
        rows.append([name, f"{old:,}", f"{new:,} ({new / old - 1:+.1%})"])
    text = markdown(rows) + (
        f"\n\nPredicted speed of decoding, by bytes of a step: {report['predicted_speedup']:.2f}x.\n"
    )
    if report["candidates"]:
        tried = [["shape", "parameters of the blocks", "KL on trial"]]
        for trial in report["candidates"]:
            shape = _shape(trial).replace("\n", ", ")
            tried.append([shape, f"{trial['block_parameters']:,}", f"{trial['kl']:.4f}"])
        text += f"\nShapes tried on few sequences:\n\n{markdown(tried)}\n"
    return text
