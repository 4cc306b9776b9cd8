"""Accuracy at length: what a compressed cache of keys and values costs, which short texts do not show.

``by_position``: divergence from the original over the positions of long windows; ``agreement``: how
many tokens a candidate goes on writing what the original writes. Both take readers, which see a
text piece by piece through their own cache, as decoding does.

tokens int64 (window,); logits (count, n, vocabulary)
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.parts import Once, always
from eval.text import mean_and_stderr, token_kl, token_nll

# Tokens that all readers see before the next ones: bounds the logits in memory.
PIECE = 64


class Reader(Protocol):
    """A model with its cache. tokens (count, n) -> logits (count, n, vocabulary) of what comes after each."""

    def __call__(self, tokens: Tensor) -> Tensor: ...

    def fork(self) -> Reader:
        """Another reader that goes on from here."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now."""
        ...


@torch.no_grad()
def by_position(
    base: Callable[[], Reader],
    candidates: Mapping[str, Callable[[], Reader]],
    windows: Iterable[Tensor],
    buckets: int,
    once: Once = always,
) -> dict[str, dict[str, Any]]:
    """Divergence of each candidate from ``base`` in ``buckets`` equal parts of the windows.

    Returns for each candidate kl and kl_stderr (nats per token, over windows), kl_p99, top1, and
    lists over the buckets bucket_kl, bucket_kl_stderr and bucket_nll_difference (candidate - base,
    nats); cache_bytes at the end of a window. The base's own have perplexity and bucket_perplexity.
    All hold ``tokens`` and ``windows``. A window is a part of ``once``.
    """
    kl: dict[str, list[Tensor]] = {name: [] for name in candidates}
    top1: dict[str, list[Tensor]] = {name: [] for name in candidates}
    nll: dict[str, list[Tensor]] = {name: [] for name in ("base", *candidates)}
    size: dict[str, int] = {}
    for i, tokens in enumerate(windows):
        rows, size = once(f"window {i}", functools.partial(_read_window, base, candidates, tokens))
        for name, collected in nll.items():
            collected.append(rows[f"{name} nll"])
        for name in candidates:
            kl[name].append(rows[f"{name} kl"])
            top1[name].append(rows[f"{name} top1"])
    counts = {"tokens": sum(map(len, nll["base"])), "windows": len(nll["base"])}
    results: dict[str, dict[str, Any]] = {
        "base": {
            "perplexity": float(torch.cat(nll["base"]).mean().exp()),
            "bucket_perplexity": [
                float(torch.cat(x).mean().exp()) for x in _cut(nll["base"], buckets)
            ],
        }
    }
    for name in candidates:
        mean, stderr = mean_and_stderr(kl[name])
        pieces = [mean_and_stderr(part) for part in _cut(kl[name], buckets)]
        change = [ours - theirs for ours, theirs in zip(nll[name], nll["base"], strict=True)]
        results[name] = {
            "kl": mean,
            "kl_stderr": stderr,
            "kl_p99": float(torch.cat(kl[name]).quantile(0.99)),
            "top1": float(torch.cat(top1[name]).mean()),
            "bucket_kl": [kl for kl, _ in pieces],
            "bucket_kl_stderr": [error for _, error in pieces],
            "bucket_nll_difference": [float(torch.cat(x).mean()) for x in _cut(change, buckets)],
        }
    for name, result in results.items():
        result |= {"cache_bytes": size[name], **counts}
    return results


def _read_window(
    base: Callable[[], Reader], candidates: Mapping[str, Callable[[], Reader]], tokens: Tensor
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Figures of every predicted token (window - 1,), "NAME nll" of all, "NAME kl" and "NAME top1" of the
    candidates, and the bytes of each cache at the end."""
    readers = {"base": base()} | {name: new() for name, new in candidates.items()}
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        # The last token of a piece predicts the first of the next one.
        targets = tokens[start + 1 : start + PIECE + 1]
        original = _log_probs(readers["base"], piece)[: len(targets)]
        targets = targets.to(original.device)
        parts.setdefault("base nll", []).append(token_nll(original, targets))
        for name in candidates:
            found = _log_probs(readers[name], piece)[: len(targets)]
            parts.setdefault(f"{name} nll", []).append(token_nll(found, targets))
            parts.setdefault(f"{name} kl", []).append(token_kl(original, found))
            same = (original.argmax(-1) == found.argmax(-1)).float()
            parts.setdefault(f"{name} top1", []).append(same)
    rows = {key: torch.cat(value).cpu() for key, value in parts.items()}
    return rows, {name: reader.nbytes for name, reader in readers.items()}


def _log_probs(reader: Reader, piece: Tensor) -> Tensor:
    return reader(piece.unsqueeze(0))[0].float().log_softmax(-1)


def _cut(rows: list[Tensor], buckets: int) -> list[list[Tensor]]:
    """The rows' parts in each bucket. A row has one position less than its window."""
    edges = [round(i * (len(rows[0]) + 1) / buckets) for i in range(buckets + 1)]
    return [[row[low:high] for row in rows] for low, high in itertools.pairwise(edges)]


@torch.no_grad()
def agreement(
    base: Callable[[], Reader],
    candidates: Mapping[str, Callable[[], Reader]],
    prompts: Tensor,
    generated: int,
) -> dict[str, dict[str, Any]]:
    """How many tokens each candidate writes greedily as ``base`` does, from prompts (count, n).

    Up to the first difference both have written the same, so a candidate reads what the base wrote, and the
    first place at which it would have gone elsewhere counts. Returns for each lengths, median, mean, and
    ``whole``, the share of prompts without a difference; at most ``generated``.
    """
    reader = base()
    written = [_last(reader, prompts).argmax(-1)]
    while len(written) < generated:
        written.append(reader(written[-1]).argmax(-1))
    text = torch.cat(written, dim=1).cpu()
    lengths = {name: _agreed(new(), prompts, text).tolist() for name, new in candidates.items()}
    return {
        name: {
            "lengths": found,
            "median": statistics.median(found),
            "mean": statistics.fmean(found),
            "whole": sum(length == generated for length in found) / len(found),
            "generated": generated,
        }
        for name, found in lengths.items()
    }


def _last(reader: Reader, prompts: Tensor) -> Tensor:
    """Logits (count, 1, vocabulary) after the prompts, which are read in pieces."""
    for piece in prompts.split(PIECE, dim=1):
        logits = reader(piece)[:, -1:]
    return logits


def _agreed(reader: Reader, prompts: Tensor, text: Tensor) -> Tensor:
    """For each prompt, how many of the tokens of ``text`` (count, generated) the reader would write."""
    last, equal = _last(reader, prompts), []
    # Pieces: most candidates differ soon.
    for expected in text.split(PIECE, dim=1):
        found = last
        if expected.shape[1] > 1:
            found = torch.cat([last, reader(expected[:, :-1])], dim=1)
        equal.append(found.argmax(-1).cpu() == expected)
        if not torch.cat(equal, dim=1).all(dim=1).any():
            break
        last = reader(expected[:, -1:])
    return torch.cat(equal, dim=1).long().cumprod(dim=1).sum(dim=1)
