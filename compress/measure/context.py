"""Accuracy of folders at length, through their caches."""

from __future__ import annotations

import functools
import hashlib
import logging
from typing import Any

import torch

from calibration.texts import load_texts
from calibration.tokens import TokenBlocks, evaluation_windows
from compress.config import ContextConfig
from compress.errors import UserError
from compress.kv_cache.folder import scheme_of
from compress.model.families import limit_of
from compress.model.folder import DTYPES, ModelFolder
from compress.model.sources import open_tokenizer
from compress.progress import track
from compress.runtime.cached import Caches, Reader
from compress.runtime.load import load_dense
from compress.runtime.probe import head_errors
from eval.context import agreement, by_position
from eval.parts import Once, always, within
from eval.retrieval import Haystack, build_haystack, score, summarize

log = logging.getLogger(__name__)


def check_context(config: ContextConfig, model: ModelFolder) -> None:
    """Raises UserError if the text is missing or too short, or the model does not take such lengths."""
    limit = limit_of(model.config)
    asked = {
        "context.tokens": config.tokens,
        "context.prompt_tokens + context.generated": config.prompt_tokens + config.generated,
        "context.lengths": max(config.lengths, default=0),
    }
    for key, tokens in asked.items():
        if limit is not None and tokens > limit:
            raise UserError(f"{key} needs {tokens} tokens, {model.path} takes {limit}: choose less")
    _context_texts(config, _documents(config), open_tokenizer(model))


def _documents(config: ContextConfig) -> list[str]:
    return load_texts(config.text, config.text_field, config.split)


def _context_texts(
    config: ContextConfig, texts: list[str], tokenizer: Any
) -> tuple[TokenBlocks, TokenBlocks, dict[int, list[Haystack]]]:
    """Long windows, prompts, and haystacks by length."""
    joined = " ".join(texts)
    windows, prompts = (
        evaluation_windows(texts, tokenizer, tokens=window * count, window=window)
        for window, count in (
            (config.tokens, config.windows),
            (config.prompt_tokens, config.prompts),
        )
    )
    haystacks = {
        length: [
            build_haystack(
                joined,
                tokenizer,
                length=length,
                facts=config.facts,
                start=i / config.haystacks,
                seed=config.seed + i,
            )
            for i in range(config.haystacks)
        ]
        for length in config.lengths
    }
    return windows, prompts, haystacks


def measure_context(
    candidate: ModelFolder,
    base: ModelFolder,
    config: ContextConfig,
    tokenizer: Any,
    device: torch.device,
    once: Once = always,
) -> dict[str, dict[str, Any]]:
    """Accuracy at length, every token through the cache of its folder; see eval.context and eval.retrieval,
    of whose parts ``once`` is asked, and for agreement and heads.

    Returns {"base", "candidate"}: ``positions``, ``retrieval`` by length and kind, ``agreement``
    and ``heads`` (the errors of a packed cache) of the candidate, and what was read.
    """
    dtype = DTYPES[config.dtype]
    texts = _documents(config)
    long, prompts, haystacks = _context_texts(config, texts, tokenizer)
    # Of another text no part is known.
    once = within(once, hashlib.sha256(" ".join(texts).encode()).hexdigest())
    folders = {"base": base, "candidate": candidate}

    @functools.cache
    def opened(name: str) -> tuple[Any, Caches]:
        model = load_dense(folders[name], device, dtype)
        return model, Caches(folders[name], model)

    def reader(name: str) -> Reader:
        return Reader(*opened(name))

    readers = {name: functools.partial(reader, name) for name in folders}
    ours = {"candidate": readers["candidate"]}
    positions = by_position(
        readers["base"], ours, track(long.tokens, "long windows"), config.buckets, once
    )
    log.info("%s at length: KL %.5f", config.text, positions["candidate"]["kl"])
    results: dict[str, dict[str, Any]] = {}
    for name, found in positions.items():
        results[name] = {
            "text": config.text,
            "data_sha256": long.sha256,
            "window": config.tokens,
            "dtype": config.dtype,
            "positions": found,
            "retrieval": {},
        }
    for length, stacks in haystacks.items():
        of_length = within(once, "haystacks of", length)
        hits = score(readers, track(stacks, f"haystacks of {length}"), once=of_length)
        for name, kinds in hits.items():
            results[name]["retrieval"][str(length)] = {
                kind: summarize(found, None if name == "base" else hits["base"][kind])
                for kind, found in kinds.items()
            }
    results["candidate"]["agreement"] = once(
        "agreement",
        lambda: agreement(readers["base"], ours, prompts.tokens, config.generated)["candidate"],
    )
    if scheme_of(candidate) is not None:
        results["candidate"]["heads"] = once(
            "heads", lambda: head_errors(*opened("candidate"), long.tokens[0])
        )
    return results
