"""Text to token blocks: seeded, fixed length, hashed.

tokens: int64 (sequences, length)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError

# One sequence in so many is held out.
HELD_OUT = 16


@dataclass(frozen=True)
class TokenBlocks:
    """tokens int64 (sequences, length); sha256 of their bytes, so that two runs can prove they saw
    the same data."""

    tokens: Tensor
    sha256: str


def _blocks(tokens: Tensor) -> TokenBlocks:
    return TokenBlocks(tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest())


def calibration_blocks(
    mix: Mapping[str, list[str]], tokenizer: Any, *, sequences: int, length: int, seed: int
) -> TokenBlocks:
    """Random blocks for calibration, as many from each part of the mix, give or take one.

    mix: documents of each part by name. Row i is of part i modulo the number of parts, so that parts
    have equal shares of the tokens, however long their documents are, also in the first rows.

    Raises UserError naming the part whose text is too short.
    """
    prefix = bos_prefix(tokenizer)
    drawn = []
    for i, (name, texts) in enumerate(mix.items()):
        generator = torch.Generator().manual_seed(seed)
        # Drawn from more than is needed, so that one long document does not fill the sample.
        blocks = _shuffled(texts, tokenizer, length - len(prefix), 4 * sequences, generator)
        wanted = len(range(i, sequences, len(mix)))
        if len(blocks) < wanted:
            raise UserError(
                f"the calibration text {name} gives {len(blocks)} blocks of {length} tokens, "
                f"{wanted} are needed: lower data.sequences or data.length, or choose a longer text"
            )
        drawn.append(blocks[torch.randperm(len(blocks), generator=generator)[:wanted]])
    rows = [drawn[i % len(drawn)][i // len(drawn)] for i in range(sequences)]
    return _blocks(_with_prefix(torch.stack(rows), prefix))


def training_blocks(
    mix: Mapping[str, list[str]],
    tokenizer: Any,
    *,
    length: int,
    seed: int,
    most: int | None = None,
) -> TokenBlocks:
    """All text of a mix, for training: the documents of each part in random order, joined with the
    end-of-text token; the tail of a part is dropped. The parts' blocks are spread evenly among each other.

    mix: documents of each part by name; most: blocks that are enough, so that no more text is tokenized
    than gives them; the parts then share them by their characters
    Raises UserError if there are fewer than 2 blocks, of which one is held out.
    """
    prefix = bos_prefix(tokenizer)
    all_characters = sum(len(text) for texts in mix.values() for text in texts)
    parts = []
    for texts in mix.values():
        generator, share = torch.Generator().manual_seed(seed), None
        if most is not None:
            share = math.ceil(most * sum(map(len, texts)) / all_characters)
        blocks = _shuffled(texts, tokenizer, length - len(prefix), share, generator)
        if share is not None:
            # A long document gives more: of all of it then, not of its start alone.
            picked = torch.randperm(len(blocks), generator=generator)[:share]
            blocks = blocks[picked.sort().values]
        parts.append(blocks)
    rows = interleave(*parts)
    if len(rows) < 2:
        raise UserError(
            f"the text {'+'.join(mix)} gives {len(rows)} blocks of {length} tokens, 2 are needed to train "
            "on one and hold one out: choose shorter blocks or a longer text"
        )
    return _blocks(_with_prefix(rows, prefix))


def held_out(sequences: int) -> tuple[Tensor, Tensor]:
    """The numbers of the sequences that are trained on, and of those that are held out, spread evenly."""
    every = min(HELD_OUT, sequences)
    is_held = torch.arange(sequences) % every == every - 1
    return (~is_held).nonzero().squeeze(1), is_held.nonzero().squeeze(1)


def interleave(*parts: Tensor) -> Tensor:
    """The rows of all, each part's in its order, spread evenly: the first rows are a fair share of all."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts])
    return torch.cat(parts)[places.argsort(stable=True)]


def _shuffled(
    texts: list[str], tokenizer: Any, length: int, enough: int | None, generator: torch.Generator
) -> Tensor:
    """Blocks (about enough or fewer, length) of the documents in random order, joined with the
    end-of-text token; None: all there are."""
    order = torch.randperm(len(texts), generator=generator).tolist()
    at_least = None if enough is None else enough * length
    stream = _stream((texts[i] for i in order), tokenizer, at_least)
    return stream[: len(stream) // length * length].view(-1, length)


def evaluation_windows(
    texts: Iterable[str], tokenizer: Any, *, tokens: int, window: int
) -> TokenBlocks:
    """The first ``tokens`` tokens of a text as windows without overlap, in order; the tail is dropped.

    A tokenizer that starts every text with BOS has it before every window, outside the count.
    Raises UserError if the text is shorter than one window.
    """
    stream = _stream(texts, tokenizer, tokens)[:tokens]
    if len(stream) < window:
        raise UserError(f"the text has {len(stream)} tokens, less than one window of {window}")
    rows = stream[: len(stream) // window * window].view(-1, window)
    return _blocks(_with_prefix(rows, bos_prefix(tokenizer)))


def bos_prefix(tokenizer: Any) -> list[int]:
    """[bos] if the tokenizer starts every text with it, else []."""
    ids, bos = tokenizer("a").input_ids, tokenizer.bos_token_id
    return ids[:1] if bos is not None and ids[:1] == [bos] else []


def _stream(texts: Iterable[str], tokenizer: Any, at_least: int | None) -> Tensor:
    """Tokens of the texts, each ended by EOS, until there are enough; None: of all."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # A list of Python's integers would take several times the memory of a large text.
    found, count = [torch.empty(0, dtype=torch.int32)], 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids + end
        found.append(torch.tensor(ids, dtype=torch.int32))
        count += len(ids)
        if at_least is not None and count >= at_least:
            break
    return torch.cat(found).long()


def _with_prefix(rows: Tensor, prefix: list[int]) -> Tensor:
    start = torch.tensor(prefix, dtype=rows.dtype).expand(len(rows), -1)
    return torch.cat([start, rows], dim=1).contiguous()
