"""The picture of where the loss comes from: KL by block, and relative output error by linear."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PICTURE = "blocks.png"


def errors_of(
    blocks: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[list[float | None]]]:
    """Linears, and of each its relative output error in every block; None where a block has none. Experts are
    one linear, with their mean.

    blocks: as for ``draw_blocks``
    """
    found: dict[str, list[list[float]]] = {}
    for index, block in enumerate(blocks):
        for name, entry in block["linears"].items():
            if "relative_error" in entry:
                row = found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", name), [])
                row += [[] for _ in range(len(blocks) - len(row))]
                row[index].append(entry["relative_error"])
    return list(found), [[mean(own) if own else None for own in row] for row in found.values()]


def draw_blocks(
    blocks: Sequence[Mapping[str, Any]], divergence: Sequence[float] | None, target: Path
) -> None:
    """Write the PNG ``target``.

    blocks: what the quantize stage reports of each block, with relative errors
    divergence: KL of each block alone, nats per token; None leaves that half out
    """
    linears, rows = errors_of(blocks)
    errors = np.array([[math.nan if x is None else x for x in row] for row in rows])
    figure = Figure(figsize=(3.5 + 0.25 * len(blocks), 6), dpi=150, layout="constrained")
    axes = figure.subplots(2 if divergence is not None else 1, 1, squeeze=False)[:, 0]
    if divergence is not None:
        axes[0].bar(range(len(blocks)), divergence)
        axes[0].set_ylabel("KL, this block alone\n(nats per token)")
        axes[0].set_xlabel("block")
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    positive = errors[errors > 0]
    scale = LogNorm(positive.min(), positive.max()) if positive.size else None
    image = axes[-1].imshow(errors, aspect="auto", norm=scale, cmap="magma_r")
    figure.colorbar(image, ax=axes[-1], label="relative output error")
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_yticks(range(len(linears)), [name.rpartition(".")[2] for name in linears])
    figure.savefig(target, format="png")
