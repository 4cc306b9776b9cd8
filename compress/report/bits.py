"""The picture of a search: which fused group of which block got how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PICTURE = "bits.png"


def draw_bits(search: Mapping[str, Any], target: Path) -> None:
    """Write the PNG ``target``: rows are fused groups in running order, columns blocks, colour bits.

    search: what ``search.choose`` reports
    """
    groups = list(search["groups"].values())
    rows = list(dict.fromkeys(tuple(group["linears"]) for group in groups))
    grid = np.full((len(rows), 1 + max(group["block"] for group in groups)), np.nan)
    for group in groups:
        grid[rows.index(tuple(group["linears"])), group["block"]] = group["bits"]
    widths = sorted({int(bits) for group in groups for bits in group["kl"]})
    # Halfway between neighbours: each width has a colour of its own, whatever lies between them.
    inner = [(low + high) / 2 for low, high in pairwise(widths)]
    edges = [widths[0] - 0.5, *inner, widths[-1] + 0.5]
    # A figure of its own, not pyplot's: nothing is left behind in the process.
    figure = Figure(figsize=(3.5 + 0.25 * grid.shape[1], 1.6 + 0.4 * len(rows)), dpi=150)
    axes = figure.add_subplot()
    image = axes.imshow(
        grid,
        cmap=ListedColormap(colormaps["viridis"](np.linspace(0, 1, len(widths)))),
        norm=BoundaryNorm(edges, len(widths)),
        aspect="auto",
    )
    bar = figure.colorbar(image, ax=axes, label="bits", spacing="uniform")
    bar.set_ticks(
        [(low + high) / 2 for low, high in pairwise(edges)], labels=[str(w) for w in widths]
    )
    axes.set_title(
        f"Bits of the linears: {search['average_bits']:.2f} on average, {search['megabytes']:.1f} MB"
    )
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("linears")
    axes.set_yticks(range(len(rows)), [_label(linears) for linears in rows])
    figure.savefig(target, format="png", bbox_inches="tight")


def _label(linears: tuple[str, ...]) -> str:
    return ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in linears)
