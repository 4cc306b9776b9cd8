"""The picture of a distillation: its losses over the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PICTURE = "distillation.png"


def draw_distillation(report: Mapping[str, Any], target: Path) -> None:
    """Write the PNG ``target``: losses while training and of held-out text, rate and speed.

    report: what the distill stage reports
    """
    figure = Figure(figsize=(12, 4), dpi=130, layout="constrained")
    losses, text, pace = figure.subplots(1, 3)
    curve, held_out = report["curve"], report["held_out"]
    per_step = report["tokens"] / report["steps"]
    tokens = [point["tokens"] for point in curve]
    if any(point.get("kl") for point in curve):
        losses.plot(tokens, [point["kl"] for point in curve], label="kl, training")
    held, kept = [per_step * point["step"] for point in held_out], report["held_out_top_k"]
    label = "kl, held out" if kept is None else f"kl, held out, of {kept} tokens: a lower bound"
    losses.plot(held, [point["kl"] for point in held_out], "s-", ms=3, label=label)
    losses.set_yscale("log")
    if any(point.get("hidden") for point in curve):
        states = losses.twinx()
        states.plot(tokens, [point["hidden"] for point in curve], color="#D55E00")
        states.set_yscale("log")
        states.set_ylabel("relative squared error of the states, training (orange)")
    losses.set_ylabel("divergence from the original, nats per token")
    if any(point.get("ce") for point in curve):
        text.plot(tokens, [point["ce"] for point in curve], label="training")
    text.plot(held, [point["nll"] for point in held_out], "s-", ms=3, label="held out")
    text.axhline(report["original_nll"], color="#999999", ls="--", label="the original, held out")
    text.set_ylabel("loss of the next token, nats")
    pace.plot(tokens, [point["tokens_per_s"] for point in curve], label="tokens/s")
    rate = pace.twinx()
    rate.plot(tokens, [point["rate"] for point in curve], color="#D55E00", label="rate")
    rate.set_ylabel("rate (orange)")
    pace.set_ylabel("tokens/s")
    for axes in (losses, text, pace):
        axes.set_xlabel("tokens")
        axes.legend()
    figure.savefig(target, format="png")
