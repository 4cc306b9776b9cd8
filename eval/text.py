"""How well a model predicts a text, and how far it strays from its original on it.

Protocol: the text is cut into windows without overlap; every token of a window but the first (BOS,
if the tokenizer starts texts with it) is predicted from those before it in the same window.
Perplexity is exp of the mean negative log-likelihood over all predicted tokens. KL(original ||
candidate) and top-1 agreement are taken over the same positions. Logits are handled a window at a
time and dropped.

tokens (window,); logits (window, vocabulary); per-token results float32 (window - 1,)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.paired import paired
from eval.parts import Once, always

# tokens (1, window) -> logits (1, window, vocabulary)
LogitsOf = Callable[[Tensor], Tensor]
# Positions handled at a time: bounds the float32 copies of the logits.
ROWS = 128


def token_nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats."""
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_kl(base_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """KL(base || candidate) at each position in nats, over the whole vocabulary."""
    return (base_log_probs.exp() * (base_log_probs - log_probs)).sum(-1)


@dataclass(frozen=True)
class Tokens:
    """What a model makes of every predicted token, a tensor (window - 1,) a window: negative log-probability
    and, where there is an original, KL(original || model) in nats and 1 where both prefer the same token."""

    nll: list[Tensor]
    kl: list[Tensor]
    top1: list[Tensor]


@torch.no_grad()
def read_text(
    models: Mapping[str, LogitsOf],
    windows: Iterable[Tensor],
    base: str | None = None,
    once: Once = always,
) -> dict[str, Tokens]:
    """Every model over the same windows, once. base: which of them is the original of the others. A window is
    a part of ``once``."""
    found = {name: Tokens([], [], []) for name in models}

    def read(tokens: Tensor) -> dict[str, dict[str, Tensor]]:
        row = tokens.unsqueeze(0)
        # Without a name, so that the logits of one window are gone before the next one's come.
        return _window({name: model(row)[0] for name, model in models.items()}, tokens, base)

    for i, tokens in enumerate(windows):
        for name, parts in once(f"window {i}", functools.partial(read, tokens)).items():
            for column, part in parts.items():
                getattr(found[name], column).append(part)
    return found


def evaluate_text(
    candidate: LogitsOf, windows: Iterable[Tensor], base: LogitsOf | None = None
) -> dict[str, dict[str, Any]]:
    """``summary`` of a candidate on the windows, and with ``base`` that of its original too.

    Returns {"candidate": ...} and, with a base, "base".
    """
    models = {"candidate": candidate} if base is None else {"candidate": candidate, "base": base}
    found = read_text(models, windows, None if base is None else "base")
    results = {"candidate": summary(found["candidate"], found.get("base"))}
    if base is not None:
        results["base"] = summary(found["base"])
    return results


def summary(found: Tokens, base: Tokens | None = None) -> dict[str, Any]:
    """Perplexity of a model and, with the original's tokens, its divergence from it.

    Standard errors take windows as independent and count their spread (delta method for perplexity).
    Returns {perplexity, perplexity_stderr, tokens, windows}, and with a base kl, kl_stderr, kl_p99, kl_p999
    (nats per token), top1, top1_stderr (share), paired (see eval.paired).
    """
    result = _perplexity(found.nll)
    if base is None:
        return result
    p99, p999 = torch.cat(found.kl).double().quantile(torch.tensor([0.99, 0.999]).double()).tolist()
    kl, kl_stderr = mean_and_stderr(found.kl)
    top1, top1_stderr = mean_and_stderr(found.top1)
    return result | {
        "kl": kl,
        "kl_stderr": kl_stderr,
        "kl_p99": p99,
        "kl_p999": p999,
        "top1": top1,
        "top1_stderr": top1_stderr,
        "paired": paired(found.nll, base.nll, found.kl, found.top1),
    }


def _perplexity(nll: list[Tensor]) -> dict[str, Any]:
    mean, stderr = mean_and_stderr(nll)
    return {
        "perplexity": math.exp(mean),
        "perplexity_stderr": None if stderr is None else math.exp(mean) * stderr,
        "tokens": sum(len(n) for n in nll),
        "windows": len(nll),
    }


def _window(
    logits: Mapping[str, Tensor], tokens: Tensor, base: str | None
) -> dict[str, dict[str, Tensor]]:
    """The columns of ``Tokens`` for one window, by model."""
    rows: dict[str, dict[str, list[Tensor]]] = {name: {} for name in logits}
    for start in range(0, len(tokens) - 1, ROWS):
        part = slice(start, min(start + ROWS, len(tokens) - 1))
        log_probs = {name: found[part].float().log_softmax(-1) for name, found in logits.items()}
        for name, found in log_probs.items():
            columns = {"nll": token_nll(found, tokens[1:][part].to(found.device))}
            if base is not None and name != base:
                theirs = log_probs[base]
                columns["kl"] = token_kl(theirs, found)
                columns["top1"] = (theirs.argmax(-1) == found.argmax(-1)).float()
            for column, values in columns.items():
                rows[name].setdefault(column, []).append(values)
    return {
        name: {column: torch.cat(parts).cpu() for column, parts in columns.items()}
        for name, columns in rows.items()
    }


def mean_and_stderr(per_window: list[Tensor]) -> tuple[float, float | None]:
    """Mean over all tokens and its standard error over windows; None of a single window, which shows no
    spread."""
    mean = float(torch.cat(per_window).double().mean())
    if len(per_window) < 2:
        return mean, None
    means = torch.stack([w.double().mean() for w in per_window])
    return mean, float(means.std() / len(means) ** 0.5)
