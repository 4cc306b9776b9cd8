"""How well a model predicts a text, and how far it strays from its original on it.

Protocol: the text is cut into windows without overlap; every token of a window but the first (BOS,
if the tokenizer starts texts with it) is predicted from those before it in the same window.
Perplexity is exp of the mean negative log-likelihood over all predicted tokens. KL(original ||
candidate) and top-1 agreement are taken over the same positions. Logits are handled a window at a
time and dropped.

tokens (window,); logits (window, vocabulary); per-token results float32 (window - 1,)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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


@torch.no_grad()
def evaluate_text(
    candidate: LogitsOf, windows: Iterable[Tensor], base: LogitsOf | None = None
) -> dict[str, dict[str, Any]]:
    """Perplexity of ``candidate`` on the windows; with ``base``, divergence from it too.

    Standard errors take windows as independent and count their spread (delta method for
    perplexity). Returns {"candidate": {perplexity, perplexity_stderr, tokens, windows}}; with a
    base, its own under "base", and in the candidate kl, kl_stderr, kl_p99 (nats per token), top1,
    top1_stderr (share).
    """
    columns: list[list[Tensor]] = [[], [], [], []]
    for tokens in windows:
        row = tokens.unsqueeze(0)
        logits = candidate(row)[0]
        base_logits = base(row)[0] if base is not None else None
        parts = _window(logits, base_logits, tokens.to(logits.device))
        for column, part in zip(columns, parts, strict=False):
            column.append(part)
    nll, base_nll, kl, top1 = columns
    if base is None:
        return {"candidate": _perplexity(nll)}
    divergence: dict[str, float | None] = {"kl_p99": float(torch.cat(kl).quantile(0.99))}
    divergence["kl"], divergence["kl_stderr"] = mean_and_stderr(kl)
    divergence["top1"], divergence["top1_stderr"] = mean_and_stderr(top1)
    return {"candidate": _perplexity(nll) | divergence, "base": _perplexity(base_nll)}


def _perplexity(nll: list[Tensor]) -> dict[str, Any]:
    mean, stderr = mean_and_stderr(nll)
    return {
        "perplexity": math.exp(mean),
        "perplexity_stderr": None if stderr is None else math.exp(mean) * stderr,
        "tokens": sum(len(n) for n in nll),
        "windows": len(nll),
    }


def _window(logits: Tensor, base_logits: Tensor | None, tokens: Tensor) -> tuple[Tensor, ...]:
    """nll, and with base logits base_nll, kl, top1, of one window."""
    rows = []
    for start in range(0, len(tokens) - 1, ROWS):
        part = slice(start, min(start + ROWS, len(tokens) - 1))
        targets = tokens[1:][part]
        log_probs = logits[part].float().log_softmax(-1)
        row = [token_nll(log_probs, targets)]
        if base_logits is not None:
            base_log_probs = base_logits[part].float().log_softmax(-1)
            row += [
                token_nll(base_log_probs, targets),
                token_kl(base_log_probs, log_probs),
                (base_log_probs.argmax(-1) == log_probs.argmax(-1)).float(),
            ]
        rows.append(row)
    return tuple(torch.cat(column).cpu() for column in zip(*rows, strict=True))


def mean_and_stderr(per_window: list[Tensor]) -> tuple[float, float | None]:
    """Mean over all tokens and its standard error over windows; None of a single window, which shows no
    spread."""
    mean = float(torch.cat(per_window).double().mean())
    if len(per_window) < 2:
        return mean, None
    means = torch.stack([w.double().mean() for w in per_window])
    return mean, float(means.std() / len(means) ** 0.5)
