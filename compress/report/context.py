"""What a cache costs at length: a table by position and a picture of the errors of every head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress.report.table import ABSENT, markdown, with_error

TABLE, PICTURE = "context.md", "heads.png"


def context_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: divergence by position, facts found, how long the candidate writes what the original does.

    rows: the sections ``context`` of original (``base``) and candidate
    """
    base, candidate = rows["base"], rows["candidate"]
    positions, size = (
        candidate["positions"],
        candidate["window"] // len(candidate["positions"]["bucket_kl"]),
    )
    lines = [["positions", "perplexity of the original", "KL", "difference in nats"]]
    for i, kl in enumerate(positions["bucket_kl"]):
        lines.append(
            [
                f"{i * size}-{(i + 1) * size - 1}",
                f"{base['positions']['bucket_perplexity'][i]:.2f}",
                with_error(kl, positions["bucket_kl_stderr"][i], "{:.5f}"),
                f"{positions['bucket_nll_difference'][i]:+.5f}",
            ]
        )
    text = f"{candidate['text']}: {positions['windows']} windows of {candidate['window']} tokens. "
    share = positions["cache_bytes"] / base["positions"]["cache_bytes"]
    overall = with_error(positions["kl"], positions["kl_stderr"], "{:.5f}")
    text += (
        f"Cache of a window: {positions['cache_bytes'] / 1e6:.2f} MB, {share:.3f} of 16 bits; KL in "
        f"nats per token, all positions {overall}, 99th percentile "
        f"{positions['kl_p99']:.5f}, top-1 agreement {positions['top1']:.2%}.\n\n{markdown(lines)}"
    )
    if candidate["retrieval"]:
        found = [["tokens", "kind", "original", "candidate", "same answers"]]
        for length, kinds in candidate["retrieval"].items():
            for kind, ours in kinds.items():
                theirs = base["retrieval"][length][kind]
                found.append(
                    [length, kind, _share(theirs), _share(ours), f"{ours['same']:.0%}"],
                )
        text += f"\n\nFacts found in real text:\n\n{markdown(found)}"
    written = candidate["agreement"]
    text += (
        f"\n\nGreedy decoding agrees with the original for {written['median']:g} tokens (median of "
        f"{len(written['lengths'])} prompts, mean {written['mean']:.0f}, at most {written['generated']}).\n"
    )
    return text


def _share(found: Mapping[str, Any]) -> str:
    if not found:
        return ABSENT
    return f"{100 * found['accuracy']:.0f}% ±{100 * found['stderr']:.0f} of {found['questions']}"


def draw_heads(errors: Mapping[str, list[list[float]]], target: Path) -> None:
    """Write the PNG ``target``: a heat map each of keys, values and attention outputs, a row a layer, a
    column a head. errors: relative squared ones, as head_errors gives them"""
    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(errors), squeeze=False)[0]
    for axis, (name, rows) in zip(axes, errors.items(), strict=True):
        values = np.array(rows)
        positive = values[values > 0]
        scale = LogNorm(positive.min(), positive.max()) if positive.size else None
        image = axis.imshow(values, aspect="auto", norm=scale, cmap="magma_r")
        axis.set(title=name, xlabel="head", ylabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axis)
    figure.suptitle("relative squared error of the cache")
    figure.savefig(target, format="png")
