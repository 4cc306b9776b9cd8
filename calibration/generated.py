"""Text of the model itself: tokens it samples, for methods that follow a model rather than a text.

A random first token, then the model's own distribution (LLM-QAT, arXiv 2305.17888, section 3.1): no
corpus is needed, and the text is as general as the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from calibration.tokens import bos_prefix
from compress.saved import NOWHERE, Saved

# Sequences that are sampled together.
BATCH = 64


@torch.inference_mode()
def generated_tokens(
    model: Any,
    *,
    sequences: int,
    length: int,
    tokenizer: Any,
    seed: int,
    saved: Saved = NOWHERE,
) -> Tensor:
    """Tokens int64 (sequences, length), sampled at temperature 1, on the model's device.

    model: a transformers model for causal language modelling
    saved: where a killed one left the batches that it had written
    Sequences start with BOS if the tokenizer's texts do, then a random token of the tokenizer (a model may
    have untrained rows beyond). End-of-text is not sampled: every sequence has the whole length.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(tokenizer), (sequences, 1), generator=generator)
    bos = torch.tensor(bos_prefix(tokenizer), dtype=torch.int64).expand(sequences, -1)
    start = torch.cat([bos, first], dim=1)[:, :length]
    position, found = saved.load(), list[Tensor]()
    if position is not None:
        found.append(position.tensors["tokens"].to(next(model.parameters()).device))
        generator.set_state(position.tensors["generator"])
    for rows in start.split(BATCH)[math.ceil(sum(map(len, found)) / BATCH) :]:
        found.append(_continued(model, rows, length, generator))
        saved.offer({}, {"tokens": torch.cat(found), "generator": generator.get_state()})
    return torch.cat(found)


def _continued(model: Any, rows: Tensor, length: int, generator: torch.Generator) -> Tensor:
    # transformers' generate() samples by drawing a number for every entry of the vocabulary, which takes
    # longer on a CPU than a small model's forward pass. One number a sequence is enough.
    device = next(model.parameters()).device
    cache, new = DynamicCache(config=model.config), rows.to(device)
    found = [new]
    for _ in range(length - rows.shape[1]):
        logits = model(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1].float()
        logits[:, _ends(model)] = -torch.inf
        cumulative = logits.softmax(-1).cumsum(-1)
        drawn = torch.rand(len(rows), 1, generator=generator).to(device) * cumulative[:, -1:]
        # Rounding may put a draw on the total itself, beyond the last token that has a share.
        last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
        new = torch.searchsorted(cumulative, drawn, right=True).minimum(last)
        found.append(new)
    return torch.cat(found, dim=1)


def _ends(model: Any) -> list[int]:
    """The ids that end a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
