"""What a candidate cost, in a line, and whether that is within the gate.

A loss is measurable if the paired comparison with the original says so on a text or a task, after Holm's
correction for how many were compared (eval.paired).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from compress.report.gate import failures
from eval.paired import holm

Row = Mapping[str, Any]


def verdict(candidate: Row, base: Row, limits: Mapping[str, float]) -> dict[str, Any] | None:
    """The verdict on a candidate from its row of metrics.json and its original's; None without a comparison.

    limits: of the gate, those that are set (compress.report.gate)
    The line names the text with the largest loss and every task with one; without one, the end of the
    intervals of all texts. Returns {text, measurable (a loss was found; None: too little text), gate: None
    or {limits, passed, failed: sentences}}.
    """
    texts = {t: f["paired"]["nll"] for t, f in candidate.get("texts", {}).items() if "paired" in f}
    tasks = {t: s["paired"] for t, s in candidate.get("tasks", {}).items() if "paired" in s}
    if not texts and not tasks:
        return None
    found = [*texts.values(), *tasks.values()]
    significant = holm([1.0 if f["p"] is None else f["p"] for f in found])
    of_texts, of_tasks = significant[: len(texts)], significant[len(texts) :]
    worse = [t for t, is_so in zip(texts, of_texts, strict=True) if is_so and texts[t]["mean"] > 0]
    worst = sorted(worse, key=lambda text: texts[text]["mean"])[-1:]
    losses = [_loss(text, texts[text]) for text in worst]
    losses += [
        _drop(t, tasks[t])
        for t, is_so in zip(tasks, of_tasks, strict=True)
        if is_so and tasks[t]["difference"] < 0
    ]
    few = [text for text, change in texts.items() if change["high"] is None]
    broken = [text for text, change in texts.items() if not math.isfinite(change["mean"])]
    if broken:
        text = f"loss without bound: log-probabilities on {', '.join(broken)} are not finite"
    elif losses:
        text = f"loss of {'; '.join(losses)}"
    else:
        text = "; ".join([_without_loss(texts, few), *_divergence(candidate, base)])
    failed = failures(candidate, base, limits)
    lost = bool(broken or losses)
    return {
        "text": text,
        "measurable": None if few and not lost else lost,
        "gate": {"limits": dict(limits), "passed": not failed, "failed": failed}
        if limits
        else None,
    }


def _without_loss(texts: Mapping[str, Row], few: list[str]) -> str:
    """How large a loss may still be; of texts with too few tokens nothing can be said."""
    if few:
        return f"too few tokens of {', '.join(few)} to tell a loss"
    ends = [change["high"] for change in texts.values()]
    return "no measurable loss" + (f" (at most {max(ends):.4f} nats per token)" if ends else "")


def passed(judged: Mapping[str, Any] | None) -> bool:
    """Whether a verdict lets its candidate through: so does one without a gate."""
    return judged is None or judged["gate"] is None or judged["gate"]["passed"]


def _loss(text: str, change: Row) -> str:
    half = (change["high"] - change["low"]) / 2
    # An interval is as lopsided as what it is of; where ± would reach below 0, its ends stand.
    beside = (
        f"±{half:.4f}"
        if half < change["mean"]
        else f"({change['low']:.4f} to {change['high']:.4f})"
    )
    return (
        f"{change['mean']:.4f} {beside} nats per token on {text} "
        f"(perplexity {math.expm1(change['mean']):+.1%})"
    )


def _drop(task: str, change: Row) -> str:
    return (
        f"{-100 * change['difference']:.1f} points on {task} ({change['lost']} answers lost, "
        f"{change['gained']} gained)"
    )


def _divergence(candidate: Row, base: Row) -> Iterator[str]:
    """The text on which the candidate strays most, beside what 16 bits alone do there."""
    for text, found in sorted(candidate.get("texts", {}).items(), key=lambda t: -t[1]["kl"])[:1]:
        noise = (base.get("texts", {}).get(text) or {}).get("noise")
        floor = "" if noise is None else f" (noise of {noise['dtype']}: {noise['kl']:.4f})"
        yield f"KL {found['kl']:.4f} on {text}{floor}"
