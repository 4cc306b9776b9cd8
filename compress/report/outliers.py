"""The outlier report of a run: which inputs of which layers reach the threshold, as numbers and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress.report.table import markdown

PICTURE, TABLE = "outliers.png", "outliers.md"


def outlier_table(outliers: Mapping[str, Any]) -> str:
    """A row a layer. outliers: what ``compress.quantize.outliers`` reports"""
    inputs = outliers["inputs"]
    header = ["layer"]
    for entry in inputs.values():
        header += [f"{_label(entry)}: columns of {entry['width']}", "values", "largest"]
        header += ["kept"] if _kept(entry) else []
    rows = [header]
    for index in range(max(len(entry["layers"]) for entry in inputs.values())):
        row = [str(index)]
        for entry in inputs.values():
            layer = entry["layers"][index]
            row += [str(layer["columns"]), f"{layer['values']:.3%}", f"{layer['largest']:.1f}"]
            row += [str(layer["kept"])] if _kept(entry) else []
        rows.append(row)
    return f"{markdown(rows)}\n\n" + "\n".join(f"- {line}" for line in _legend(outliers)) + "\n"


def _legend(outliers: Mapping[str, Any]) -> list[str]:
    threshold = outliers["threshold"]
    lines = [
        f"{outliers['linears_above']} of {outliers['linears']} linears read an |x| >= {threshold:g} on the "
        "calibration text, before any transform.",
        "columns: input columns that reach it at least once; values: share of all inputs that do; largest: "
        "|x|; kept, after the transforms: columns that stay in 16 bits, where they are found while it runs "
        "those of all calibration tokens together.",
    ]
    rule = outliers["rule"]
    for entry in outliers["inputs"].values():
        found = [
            f"{f['column']} ({f['layers']:.0%}, {f['positions']:.0%})" for f in entry["features"]
        ]
        lines.append(
            f"Outlier features of {_label(entry)} (in at least {rule['layers']:.0%} of the layers and at "
            f"{rule['positions']:.0%} of the positions, LLM.int8 section 4.1; column, then both shares): "
            f"{', '.join(found) or 'none'}."
        )
    return lines


def draw_outliers(outliers: Mapping[str, Any], target: Path) -> None:
    """Write the PNG ``target``: share of columns with outliers, and largest |x|, by input and layer."""
    inputs = outliers["inputs"].values()
    share = np.array([[100 * x["columns"] / e["width"] for x in e["layers"]] for e in inputs])
    largest = np.array([[x["largest"] for x in e["layers"]] for e in inputs])
    figure = Figure(figsize=(3.5 + 0.25 * share.shape[1], 6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1)
    # One column of a thousand is to be seen beside all of them; where there is none it stays blank.
    some = np.ma.masked_equal(share, 0)
    scale = LogNorm(0.1, 100) if some.count() else None
    image = top.imshow(some, aspect="auto", norm=scale, cmap="magma_r")
    figure.colorbar(image, ax=top, label=f"% of columns with |x| >= {outliers['threshold']:g}")
    positive = largest[largest > 0]
    scale = LogNorm(positive.min(), positive.max()) if positive.size else None
    image = bottom.imshow(largest, aspect="auto", norm=scale, cmap="magma_r")
    figure.colorbar(image, ax=bottom, label="largest |x|")
    for axes in (top, bottom):
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(share)), [_label(entry) for entry in inputs])
    figure.savefig(target, format="png")


def _label(entry: Mapping[str, Any]) -> str:
    return ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in entry["readers"])


def _kept(entry: Mapping[str, Any]) -> bool:
    return "kept" in entry["layers"][0]
