"""The gate: how much a candidate may lose before it is turned down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from compress.errors import UserError
from eval.task_scores import headline

PREFIX = "gate."
# The least and the largest that make sense.
RANGES = {"kl": (0, math.inf), "perplexity": (1, math.inf), "top1": (0, 1), "accuracy": (0, 100)}


@dataclass
class Gate:
    """The most that a candidate may cost, null = any.

    kl: nats per token on every text; perplexity: its ratio to the original's; top1: the least share of
    tokens on which both prefer the same; accuracy: points of a hundred lost on any task
    """

    kl: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    accuracy: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


def check_limit(name: str, limit: float) -> None:
    """Raises UserError for one that nothing or everything would keep to."""
    least, most = RANGES[name]
    if not least <= limit <= most or math.isinf(limit):
        allowed = f"{least} or more" if math.isinf(most) else f"{least} to {most}"
        raise UserError(f"{PREFIX}{name}={limit:g} is not allowed: choose {allowed}")


def read_limits(words: Iterable[str]) -> dict[str, float]:
    """Limits from words such as gate.kl=0.05. Raises UserError for anything else."""
    limits = {}
    for word in words:
        key, _, value = word.partition("=")
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX) or name not in RANGES:
            known = ", ".join(f"{PREFIX}{limit}" for limit in RANGES)
            raise UserError(f"{word} is not allowed: choose KEY=VALUE of {known}")
        try:
            limit = float(value)
        except ValueError:
            raise UserError(f"{word} is not allowed: choose a number") from None
        check_limit(name, limit)
        limits[name] = limit
    return limits


def described(limits: Mapping[str, float]) -> str:
    """The limits in words."""
    texts = {
        "kl": "KL at most {:g} on every text",
        "perplexity": "perplexity at most {:g} times the original's on every text",
        "top1": "the original's likeliest token for at least {:.3g} of every text",
        "accuracy": "points lost on every task at most {:g}",
    }
    return ", ".join(texts[name].format(limit) for name, limit in limits.items())


def failures(
    candidate: Mapping[str, Any], base: Mapping[str, Any], limits: Mapping[str, float]
) -> list[str]:
    """Why a candidate does not pass, a clause each; empty if it does. What a limit is about and was not
    measured is a failure too, and so is what is no number.

    candidate, base: the rows of metrics.json
    limits: kl: the largest on any text, nats per token; perplexity: the largest over the original's;
    top1: the smallest on any text, a share; accuracy: the most points that any task may lose
    """
    texts = candidate.get("texts") or {}
    found: list[str] = []
    for name, limit in limits.items():
        if name == "accuracy":
            found += _tasks_lost(candidate.get("tasks") or {}, base.get("tasks") or {}, limit)
            continue
        values = {
            text: _of_text(name, own, (base.get("texts") or {}).get(text, {}))
            for text, own in texts.items()
        }
        found += [
            _clause(name, value, text, limit)
            for text, value in values.items()
            if not _keeps(name, value, limit)
        ]
        if not values:
            found.append(f"{_TITLES[name]} was not measured")
    return found


_TITLES = {"kl": "KL", "perplexity": "the perplexity ratio", "top1": "top-1 agreement"}


def _keeps(name: str, value: float | None, limit: float) -> bool:
    """No value, and one that is not a number, keeps to nothing."""
    return value is not None and (value >= limit if name == "top1" else value <= limit)


def _of_text(name: str, own: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    return perplexity_ratio(own, base) if name == "perplexity" else own.get(name)


def perplexity_ratio(own: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Candidate over original on the same tokens; None if one of them has no perplexity."""
    if "paired" in own:
        return math.exp(own["paired"]["nll"]["mean"])
    if "perplexity" not in own or "perplexity" not in base:
        return None
    return own["perplexity"] / base["perplexity"]


def _clause(name: str, value: float | None, text: str, limit: float) -> str:
    if value is None:
        return f"{_TITLES[name]} was not measured on {text}"
    if math.isnan(value):
        return f"{_TITLES[name]} on {text} is not a number"
    side = "below" if name == "top1" else "above"
    return f"{_TITLES[name]} {value:.4f} on {text} is {side} {limit:g}"


def _tasks_lost(tasks: Mapping[str, Any], base: Mapping[str, Any], limit: float) -> Iterable[str]:
    if not tasks:
        yield "no task was measured"
    for task, score in tasks.items():
        difference = task_difference(score, base.get(task))
        if difference is None:
            had = (
                "the original was not measured on" if headline(score) else "there is no accuracy of"
            )
            yield f"{had} {task}"
        elif not difference >= -limit / 100:
            yield f"{-100 * difference:.2f} points lost on {task} are above {limit:g}"


def task_difference(score: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    """Candidate minus original as a share, by the task's headline metric; None without an original."""
    if "paired" in score:
        return score["paired"]["difference"]
    metric = headline(score)
    if base is None or metric is None or metric not in base:
        return None
    return score[metric] - base[metric]
